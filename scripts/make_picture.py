"""Draw the README's picture: which tokens, experts and layers of the bundled model predicted the next word.

python scripts/make_picture.py notebooks/explain.png
"""

import sys

import moejax
from moejax import report

PROMPT = "And the LORD said unto Moses, Speak unto the children of"

if __name__ == "__main__":
    relevance = moejax.explain(moejax.load("tiny-olmoe"), PROMPT)
    report.figure(relevance.to_dict()).savefig(sys.argv[1], dpi=110, bbox_inches="tight")
