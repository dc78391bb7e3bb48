"""Talk to a running server with OpenAI's own client: one answer at once, one as it is written.

pip install openai; diptych serve; then: python examples/openai_client.py [http://127.0.0.1:8000]
"""

import os
import sys

from openai import OpenAI

url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"
client = OpenAI(base_url=f"{url}/v1", api_key=os.environ.get("DIPTYCH_API_KEY", "none"))
model = client.models.list().data[0].id

whole = client.completions.create(model=model, prompt="The fox", max_tokens=24, temperature=0)
print(whole.choices[0].text)

messages = [{"role": "user", "content": "Tell me a story about a fox."}]
stream = client.chat.completions.create(model=model, messages=messages, max_tokens=48, temperature=0, stream=True)
for event in stream:
    print(event.choices[0].delta.content or "", end="", flush=True)
print()
