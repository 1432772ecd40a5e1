"""`python -m layerskip_vllm.tools`, the same as the command `layerskip-vllm`."""

from layerskip_vllm.tools.commands import main

raise SystemExit(main())
