"""Embeddings and reranking with OpenAI's client: which of these sentences is closest to a question?

    diptych serve --prefill 2 --decode 1      # in one terminal
    python examples/embeddings.py             # in another; --url where the server is elsewhere

Prompts of embeddings are computed by prefill workers, and no decode worker hears of them (`/workers` shows it). The
bundled model was trained to write, not to embed: its opinion is worth little.
"""

import argparse

import httpx
import openai

SENTENCES = ["The fox ran over the hill.", "The code of the red door is 4711.", "A cat sleeps in the sun."]
QUESTION = "Where did the fox run?"


def main() -> None:
    """Embed everything, then let the server do the comparing."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    url = parser.parse_args().url
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
        model = client.models.list().data[0].id
        reply = client.embeddings.create(model=model, input=[QUESTION, *SENTENCES])
    question, *others = (each.embedding for each in reply.data)  # of length 1: their dot product is the cosine
    for sentence, vector in zip(SENTENCES, others, strict=True):
        print(f"{sum(a * b for a, b in zip(question, vector, strict=True)):.4f}  {sentence}")
    print(f"{reply.usage.prompt_tokens} tokens, {len(question)} numbers each")

    ranked = httpx.post(f"{url}/v1/rerank", json={"query": QUESTION, "documents": SENTENCES, "top_n": 1}).json()
    (best,) = ranked["results"]
    print(f"closest: {best['document']['text']} ({best['relevance_score']:.4f})")


if __name__ == "__main__":
    main()
