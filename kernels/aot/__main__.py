import sys

from vllm_gumiho.kernels.aot import main

sys.exit(main())
