"""A running server as a LangChain chat model, by its OpenAI integration.

pip install langchain-openai; diptych serve; then: python examples/langchain_client.py [URL]
"""

import os
import sys

from openai import OpenAI

try:
    from langchain_openai import ChatOpenAI
except ImportError:
    sys.exit("this example needs langchain-openai: pip install langchain-openai")

url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"
key = os.environ.get("DIPTYCH_API_KEY", "none")
name = OpenAI(base_url=f"{url}/v1", api_key=key).models.list().data[0].id
model = ChatOpenAI(model=name, base_url=f"{url}/v1", api_key=key, temperature=0, max_tokens=48)
print(model.invoke("Tell me a story about a fox.").content)
for part in model.stream("Tell me a story about a hen."):
    print(part.content, end="", flush=True)
print()
