"""An answer that keeps to a JSON schema, whatever the model would rather say.

pip install openai 'diptych[structured]'; diptych serve; then: python examples/structured_output.py [URL]
"""

import json
import os
import sys

from openai import OpenAI

SCHEMA = {
    "type": "object",
    "properties": {
        "animal": {"enum": ["fox", "hen", "owl"]},
        "hungry": {"type": "boolean"},
        "legs": {"type": "integer", "minimum": 2, "maximum": 4},
    },
    "required": ["animal", "hungry", "legs"],
    "additionalProperties": False,
}

url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"
client = OpenAI(base_url=f"{url}/v1", api_key=os.environ.get("DIPTYCH_API_KEY", "none"))
answer = client.chat.completions.create(
    model=client.models.list().data[0].id,
    messages=[{"role": "user", "content": "Tell me a story about a fox."}],
    response_format={"type": "json_schema", "json_schema": {"name": "animal", "schema": SCHEMA}},
    max_tokens=400,  # a small model likes to write spaces between the fields
    temperature=0,
)
print(json.loads(answer.choices[0].message.content))
