"""A whole cluster inside one Python process: a prefill and a decode worker, and no server.

Run: python examples/offline.py [model folder or hub name]
"""

import sys

from diptych import LLM

with LLM(sys.argv[1] if len(sys.argv) > 1 else "demo", prefill=1, decode=1) as llm:
    for answer in llm.generate(["The fox", "Once upon a time"], max_tokens=24):
        print(answer.text, f"[{answer.reason}, {len(answer.tokens)} tokens]")
    sampled = llm.generate("The fox", max_tokens=24, temperature=0.8, seed=7)
    print(sampled.text)
