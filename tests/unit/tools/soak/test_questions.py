"""What a soak asks: each kind of question has what it is for, and each seed is asked again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from layerskip_vllm.tools.server.service import Service
from layerskip_vllm.tools.soak.questions import make_questions
from layerskip_vllm.tools.soak.traffic import SCORE, Traffic

SERVICE = Service(
    url="http://127.0.0.1:1",
    model="model",
    max_model_len=2048,
    num_speculative_tokens=4,
    pieces=tuple(tuple(range(start, start + 30)) for start in range(0, 480, 30)),
    is_chat=False,
)
QUESTIONS = make_questions(SERVICE, 400, seed=0)


def bodies_of(kind: str) -> list[Mapping[str, Any]]:
    bodies = [question.body for question in QUESTIONS if question.kind == kind]
    assert len(bodies) > 20
    return bodies


def test_questions_are_the_same_when_the_seed_is() -> None:
    assert make_questions(SERVICE, 400, seed=0) == QUESTIONS
    assert make_questions(SERVICE, 400, seed=1) != QUESTIONS


def test_tokens_of_their_own_are_scored() -> None:
    lengths = {len(body["logprob_token_ids"]) for body in bodies_of("token logprobs")}
    assert min(lengths) == 1
    assert max(lengths) > 20  # the server's own likeliest are 20 at most


def test_biases_go_both_ways_and_penalties_stand_beside() -> None:
    bodies = bodies_of("biases")
    values = [bias for body in bodies for bias in body["logit_bias"].values()]
    assert min(values) < -5 < 5 < max(values)
    assert {body["repetition_penalty"] for body in bodies} == {1.0, 1.3}


def test_grammars_are_of_each_form_and_go_on_after_their_end() -> None:
    bodies = bodies_of("grammar")
    forms = {form for body in bodies for form in body["structured_outputs"]}
    assert forms == {"regex", "choice", "json"}
    assert {body["ignore_eos"] for body in bodies} == {True, False}


def test_tiny_prompts_are_of_a_token_or_two() -> None:
    assert {len(body["prompt"]) for body in bodies_of("tiny prompt")} == {1, 2}


def test_seeds_are_asked_again_and_items_scored_when_the_server_has_nothing_else_to_do() -> None:
    requests = Traffic(SERVICE, QUESTIONS, seed=0).list_alone()
    seeded = [request for request in requests if request.kind == "seeded"]
    assert len(seeded) == 6
    bodies = [json.loads(request.payload) for request in seeded]
    assert [body["seed"] for body in bodies] == [7, 7, 7, 0, 0, 0]
    assert all(body["prompt"] == bodies[0]["prompt"] for body in bodies)
    assert seeded[0].repeated is seeded[2].repeated is not None
    assert seeded[3].repeated is not seeded[0].repeated
    assert [request.path for request in requests].count(SCORE) == 1


def test_every_kind_of_request_is_drawn_when_traffic_goes_on() -> None:
    traffic = Traffic(SERVICE, QUESTIONS, seed=0)
    drawn = {traffic.draw().kind for _ in range(500)}
    assert {"one candidate", "sampled", "malformed", "over-long", "chat", "score"} <= drawn
