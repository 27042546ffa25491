"""
What a request to `aligngpt serve` may ask beside an answer, by the model's own levels: how well it fits its image
(`judge`), and the best of several answers (`best_of`).
"""

import json
from contextvars import ContextVar
from typing import Any

from fastapi import HTTPException
from fastapi.responses import JSONResponse

from ..verdicts import judge_texts


class Judging:
    """
    The judging of one request.

    Args:
        best_of: answers that are drawn; the one with the highest mean level is given.
        question: the last one of the conversation.
    """

    def __init__(self, best_of: int, question: str):
        self.best_of, self.question = best_of, question
        self.image: Any = None
        self.verdict: dict[str, Any] | None = None

    @classmethod
    def of(cls, body: dict[str, Any]) -> "Judging | None":
        """What a checked request asks for; its own fields are taken out of `body`."""
        judge, best_of = body.pop("judge", False), body.pop("best_of", 1)
        if not judge and best_of == 1:
            return None
        content = body["messages"][-1]["content"]
        if not isinstance(content, str):
            content = "\n".join(part["text"] for part in content if "text" in part)
        return cls(best_of, content)

    def take_image(self, images: list) -> None:
        """The image that answers are judged by; an HTTPException for a conversation with none or several."""
        if len(images) != 1:
            raise HTTPException(400, f"judge, best_of: answers are judged by one image, not by {len(images)}.")
        self.image = images[0]

    def choose(self, model, processor, texts: list[str]) -> int:
        """Number of the best answer, whose verdict is kept; answers without words come last."""
        worded = [number for number, text in enumerate(texts) if text.strip()]
        if not worded:
            return 0
        question = self.question if model.config.judges_answers else None
        words = [texts[number].strip() for number in worded]
        verdicts = judge_texts(model, processor, [self.image] * len(words), words, question, sentences=True)
        best = max(range(len(words)), key=lambda place: verdicts[place]["mean_level"])
        self.verdict = {name: value for name, value in verdicts[best].items() if name != "text"}
        if self.best_of > 1:
            self.verdict["candidates"] = [
                {"text": verdict["text"], "mean_level": verdict["mean_level"]} for verdict in verdicts
            ]
        return worded[best]

    def beside(self, response: JSONResponse) -> JSONResponse:
        """The response with the verdict as `alignment` of its choice; `None` for an answer without words."""
        body = json.loads(response.body)
        body["choices"][0]["alignment"] = self.verdict
        return JSONResponse(body)


# of the request that this task answers
current: ContextVar[Judging | None] = ContextVar("judging", default=None)
