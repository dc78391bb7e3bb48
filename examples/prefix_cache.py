"""The second question about the same text is answered sooner: its KV is still there.

pip install openai; diptych serve; then: python examples/prefix_cache.py [URL]
"""

import os
import sys
import time

from openai import OpenAI

url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"
client = OpenAI(base_url=f"{url}/v1", api_key=os.environ.get("DIPTYCH_API_KEY", "none"))
model = client.models.list().data[0].id
text = f"At {time.time()} " + "the fox went to the river and looked at the water. " * 40  # new every time it runs

for question in ("Who went?", "Where to?"):
    begin = time.perf_counter()
    answer = client.completions.create(model=model, prompt=f"{text}\n{question}", max_tokens=1, temperature=0)
    seconds = time.perf_counter() - begin
    cached = answer.usage.prompt_tokens_details.cached_tokens
    print(f"{question} {answer.usage.prompt_tokens} prompt tokens, {cached} of them cached, {1e3 * seconds:.0f} ms")
