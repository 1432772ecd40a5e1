"""`python -m layerskip_vllm.cli`, the same as the command `layerskip-vllm`."""

from layerskip_vllm.cli import main

raise SystemExit(main())
