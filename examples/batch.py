"""A batch: a file of questions in, a file of answers out, while the server answers others first.

python examples/batch.py [--base-url http://127.0.0.1:30000/v1] [QUESTION …]
"""

import argparse
import json
import time

from openai import OpenAI


def main() -> None:
    parser = argparse.ArgumentParser(description="Ask questions as one batch.")
    parser.add_argument("--base-url", default="http://127.0.0.1:30000/v1")
    parser.add_argument("--api-key", default="none", help="needed only if the server was started with --api-key")
    parser.add_argument("--max-tokens", type=int, default=50, help="longest answer")
    parser.add_argument("questions", nargs="*", default=["What is the capital of France?", "What is a prime number?"])
    args = parser.parse_args()

    client = OpenAI(base_url=args.base_url, api_key=args.api_key)
    model = client.models.list().data[0].id
    lines = [
        {
            "custom_id": f"question-{number}",
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {
                "model": model,
                "messages": [{"role": "user", "content": question}],
                "max_tokens": args.max_tokens,
                "temperature": 0,
            },
        }
        for number, question in enumerate(args.questions)
    ]
    data = "".join(json.dumps(line) + "\n" for line in lines)
    source = client.files.create(file=("questions.jsonl", data.encode()), purpose="batch")
    batch = client.batches.create(input_file_id=source.id, endpoint="/v1/chat/completions", completion_window="24h")
    while batch.status not in ("completed", "failed", "expired", "cancelled"):
        time.sleep(0.2)
        batch = client.batches.retrieve(batch.id)
    print(f"{batch.status}: {batch.request_counts.completed} of {batch.request_counts.total} lines")

    # Lines come in the order in which they ended; `custom_id` says which is which.
    answers = {}
    if batch.output_file_id:
        for line in client.files.content(batch.output_file_id).text.splitlines():
            result = json.loads(line)
            answers[result["custom_id"]] = result["response"]["body"]["choices"][0]["message"]["content"]
    for number, question in enumerate(args.questions):
        print(f"> {question}\n{answers.get(f'question-{number}', '(failed)')}")
    for file_id in filter(None, (source.id, batch.output_file_id, batch.error_file_id)):
        client.files.delete(file_id)


if __name__ == "__main__":
    main()
