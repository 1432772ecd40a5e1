import pytest

from benchmarks.decoding.weight_counts import WeightCounts, count_weights

LLAMA_3_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
}
LLAMA_3_2_1B = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 128256,
    "tie_word_embeddings": True,
}
LLAMA_2_7B = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 32000,
}
ROUND = WeightCounts(layer=9, head=10, embedding=10, num_layers=10)


@pytest.mark.parametrize(
    ("config", "total"),
    [
        (LLAMA_3_8B, 8_030_261_248),
        (LLAMA_3_2_1B, 1_235_814_400),
        (LLAMA_2_7B, 6_738_415_616),
    ],
)
def test_count_weights_gives_published_total_when_config_is_llamas(config, total):
    assert count_weights(config).total == total


@pytest.mark.parametrize(
    ("config", "layers"), [(LLAMA_3_8B, 2.41), (LLAMA_3_2_1B, 4.32), (LLAMA_2_7B, 0.65)]
)
def test_count_weights_gives_head_in_layers_when_config_is_llamas(config, layers):
    counts = count_weights(config)
    assert counts.head / counts.layer == pytest.approx(layers, abs=0.005)


def test_count_weights_reads_head_but_no_embedding_when_they_are_tied():
    tied, untied = (
        count_weights(LLAMA_3_2_1B),
        count_weights(LLAMA_3_2_1B | {"tie_word_embeddings": False}),
    )
    assert tied.whole == untied.whole
    assert untied.total - tied.total == 2048 * 128256


def test_shares_are_first_layers_and_head_by_whole_when_counted_by_hand():
    # Whole: 10 * 9 + 10 = 100. One draft from 2 layers: 2 * 9 + 10 = 28.
    assert ROUND.shares(exit_layer=2).total == pytest.approx(0.28)


@pytest.mark.parametrize("exit_layer", [0, 11])
def test_shares_refuse_exit_layer_when_it_is_no_layer(exit_layer):
    with pytest.raises(ValueError, match=rf"exit_layer is {exit_layer}.*between 1 and 10"):
        ROUND.shares(exit_layer)
