import sys

from vllm_gumiho.kernels.bench import main

sys.exit(main())
