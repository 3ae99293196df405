"""Convert a Hugging Face checkpoint to Orbax; the same as ``moejax convert``.

python scripts/convert_checkpoint.py allenai/OLMoE-1B-7B-0125-Instruct olmoe-orbax --dtype bfloat16
"""

import sys

from moejax.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "convert")
    main()
