"""OpenAI's documents from pieces of answers."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any

from errata.serve.rows import OutputChunk, Row, Token


class OpenAIResponse:
    """What one request is answered with, whole or in chunks; ``chat`` or not."""

    def __init__(self, model: str, chat: bool) -> None:
        self.model, self.chat = model, chat
        self.id = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"
        self.created = int(time.time())

    def _head(self, chunk: bool) -> dict[str, Any]:
        kind = ("chat.completion.chunk" if chunk else "chat.completion") if self.chat else "text_completion"
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def whole(self, rows: Sequence[Row], pieces: Sequence[OutputChunk]) -> dict[str, Any]:
        """Of all rows, by index."""
        choices = [self._choice(rows[p.index], p) for p in sorted(pieces, key=lambda p: p.index)]
        return {**self._head(False), "choices": choices, "usage": usage(rows)}

    def _choice(self, row: Row, piece: OutputChunk) -> dict[str, Any]:
        out: dict[str, Any] = {"index": piece.index, "finish_reason": piece.finish_reason, "logprobs": self._likely(row, piece.tokens)}
        return (
            {**out, "message": {"role": "assistant", "content": piece.text, "refusal": None}} if self.chat else {**out, "text": piece.text}
        )

    def begin(self, index: int) -> dict[str, Any]:
        """The first chunk of a chat answer: who speaks."""
        delta = {"role": "assistant", "content": ""}
        return {**self._head(True), "choices": [{"index": index, "delta": delta, "finish_reason": None, "logprobs": None}]}

    def chunk(self, row: Row, piece: OutputChunk) -> dict[str, Any]:
        said = {"delta": {"content": piece.text} if piece.text else {}} if self.chat else {"text": piece.text}
        choice = {"index": piece.index, **said, "finish_reason": piece.finish_reason, "logprobs": self._likely(row, piece.tokens)}
        return {**self._head(True), "choices": [choice]}

    def usage(self, rows: Sequence[Row]) -> dict[str, Any]:
        """The last chunk where it was asked for."""
        return {**self._head(True), "choices": [], "usage": usage(rows)}

    def _likely(self, row: Row, tokens: Sequence[Token]) -> dict[str, Any] | None:
        if row.params.logprobs is None:
            return None
        if self.chat:
            return {
                "content": [{**_bytes(t.text, t.logprob), "top_logprobs": [_bytes(*pair) for pair in t.top]} for t in tokens],
                "refusal": None,
            }
        return {
            "tokens": [t.text for t in tokens],
            "token_logprobs": [t.logprob for t in tokens],
            "top_logprobs": [dict(t.top) for t in tokens] if row.params.logprobs else None,
            "text_offset": [t.offset for t in tokens],
        }


def _bytes(text: str, logprob: float) -> dict[str, Any]:
    return {"token": text, "logprob": logprob, "bytes": list(text.encode("utf-8", "replace"))}


def usage(rows: Sequence[Row]) -> dict[str, Any]:
    """Tokens of each prompt once, and of all answers."""
    prompts = {id(row.encoded): len(row.encoded.ids) for row in rows}
    said = sum(row.count for row in rows)
    return {"prompt_tokens": sum(prompts.values()), "completion_tokens": said, "total_tokens": sum(prompts.values()) + said}
