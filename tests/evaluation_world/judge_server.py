"""An OpenAI-compatible judge that answers by rule: `python judge_server.py LOG` prints its port and serves."""

import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


def judge(prompt: str, temperature: float) -> str:
    """MM-Vet: 1.0 where the truth is the answer; LLaVA-Bench: 8 and 6 points; MMBench: always B."""
    last = prompt.rstrip().split("\n")[-1]
    if prompt.startswith("[Context]"):
        return "8 6\nThe first is better."
    if prompt.startswith("You are an AI assistant who will help me to match"):
        return "B"
    question, truth, answer = (cell.strip() for cell in last.split(" | ")[:3])
    if "hesitates" in question and temperature == 0:
        return "Hard to say."
    return "1.0" if truth == answer.removesuffix("|").strip() else "0.0"


class Handler(BaseHTTPRequestHandler):
    log: Path

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.log.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"path": self.path, "key": self.headers["Authorization"], **body}) + "\n")
        if body["model"] != "rule":
            return self._reply(404, {"error": {"message": f"no model {body['model']}"}})
        content = judge(body["messages"][0]["content"], body.get("temperature", 0))
        choice = {"index": 0, "message": {"role": "assistant", "content": content}, "finish_reason": "stop"}
        self._reply(200, {"id": "1", "object": "chat.completion", "created": 0, "model": "rule", "choices": [choice]})

    def _reply(self, status: int, content: dict):
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


if __name__ == "__main__":
    Handler.log = Path(sys.argv[1])
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(server.server_port, flush=True)
    server.serve_forever()
