"""The seeded mix of requests: good ones, bad ones, and clients that go away.

A `Call` is plain data; `send` makes it over HTTP and says what became of it.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any

import aiohttp

MODEL = "soak"
TOPICS = (
    "the sea", "a bicycle", "winter", "bread", "the moon", "a small town", "music", "old maps", "rivers", "a garden",
    "trains", "the desert",
)  # fmt: skip
QUESTIONS = ("Write one sentence about {}.", "List three words about {}:", "Why do people like {}?")
RULES = "You are a helpful assistant. Answer briefly, in plain words, and do not repeat the question. " * 16

# Kind of call: its share of the mix, in per cent.
GOOD = {
    "completion": 18, "completion, streamed": 14, "long": 4, "chat": 10, "chat, streamed": 8, "structured": 3,
    "sampled": 10,
}  # fmt: skip
LEAVING = {"hang up in stream": 9, "abort": 7, "half a body": 3}
BAD = {"malformed": 9, "oversize": 5}
# Tokens of a long answer: it asks for a new KV block twice or more while it runs.
LONG_TOKENS = 280
# Places of long calls in every hundred: next to each other, so that they run together and the KV cache runs out in a
# small load too.
LONG_AT = range(20, 20 + GOOD["long"])
COMPARED = tuple(kind for kind in GOOD if kind != "sampled")


@dataclass(frozen=True)
class Call:
    """One request.  text_of: what the answer's text is compared under.  leave_after: chunks, or seconds for 'abort'."""

    kind: str
    path: str
    body: dict[str, Any] | bytes
    text_of: str | None = None
    leave_after: float | None = None


@dataclass(frozen=True)
class Outcome:
    """What became of a call: answered, refused (status 4xx), left (by us) or failed."""

    call: Call
    state: str
    seconds: float
    text: str | None = None
    detail: str = ""


def pool(seed: int, size: int, least_tokens: int, most_tokens: int) -> dict[str, tuple[str, dict[str, Any]]]:
    """Greedy requests of known texts: key to (path, body).  Half share a long beginning, for the prefix cache."""
    rng = random.Random(seed)
    requests: dict[str, tuple[str, dict[str, Any]]] = {}
    for i in range(size):
        question = rng.choice(QUESTIONS).format(rng.choice(TOPICS)) + f" ({i})"
        body: dict[str, Any] = {
            "model": MODEL,
            "temperature": 0,
            "max_tokens": rng.randint(least_tokens, most_tokens),
        }
        shared = RULES if i % 2 else ""
        if i % 12 == 5:
            body |= {"prompt": shared + question, "max_tokens": LONG_TOKENS, "ignore_eos": True}
            requests[f"long {i}"] = ("/v1/completions", body)
        elif i % 3 == 0:
            system = [{"role": "system", "content": shared}] if shared else []
            body["messages"] = [*system, {"role": "user", "content": question}]
            requests[f"chat {i}"] = ("/v1/chat/completions", body)
        elif i % 7 == 1:
            body |= {"prompt": shared + question, "structured_outputs": {"regex": "[a-z]{3,8}( [a-z]{3,8}){1,3}"}}
            requests[f"structured {i}"] = ("/v1/completions", body)
        else:
            requests[f"completion {i}"] = ("/v1/completions", body | {"prompt": shared + question})
    return requests


def mix(seed: int, count: int, known: dict[str, tuple[str, dict[str, Any]]], max_model_len: int) -> list[Call]:
    """``count`` calls in a seeded order, but for the long ones.  Every kind of bad body comes in turn."""
    rng = random.Random(seed)
    shares = {kind: share for kind, share in (GOOD | LEAVING | BAD).items() if kind != "long"}
    kinds = rng.choices(list(shares), list(shares.values()), k=count)
    malformed = 0
    calls = []
    for place, drawn in enumerate(kinds):
        kind = "long" if place % 100 in LONG_AT else drawn
        if kind == "malformed":
            path, body = MALFORMED[malformed % len(MALFORMED)]
            malformed += 1
            calls.append(Call(kind, path, body))
            continue
        calls.append(_call(kind, rng, known, max_model_len))
    return calls


def _call(kind: str, rng: random.Random, known: dict[str, Any], max_model_len: int) -> Call:
    family = kind.split(",")[0]
    key = rng.choice([key for key in known if key.startswith(family if family in GOOD else "completion")] or [*known])
    path, body = known[key]
    if kind in COMPARED:
        return Call(kind, path, body | {"stream": "streamed" in kind}, text_of=key)
    if kind == "sampled":
        return Call(kind, path, body | {"temperature": 0.8, "top_p": 0.9})
    if kind == "oversize":
        over = rng.choice([{"prompt": "sea " * (2 * max_model_len)}, {"prompt": [3] * (max_model_len + 1)}])
        return Call(kind, "/v1/completions", body | over)
    longer = body | {"max_tokens": 64, "ignore_eos": True}
    if kind == "hang up in stream":
        return Call(kind, path, longer | {"stream": True}, leave_after=rng.randint(1, 6))
    if kind == "abort":
        return Call(kind, path, longer, leave_after=rng.uniform(0.0, 3.0))
    return Call("half a body", path, json.dumps(longer).encode())


def _completion(**change: Any) -> dict[str, Any]:
    return {"model": MODEL, "prompt": "Hello", "max_tokens": 4} | change


MALFORMED: list[tuple[str, dict[str, Any] | bytes]] = [
    *(("/v1/completions", body) for body in (b"", b"{", b"[1, 2]", b"null", b"\xff\xfe", b'{"model":')),
    *(
        ("/v1/completions", _completion(**change))
        for change in (
            {"model": "another"}, {"model": 7}, {"prompt": {"a": 1}}, {"prompt": [-1]}, {"prompt": [10**7]},
            {"prompt": ["a", 3]}, {"max_tokens": "many"}, {"max_tokens": -3}, {"max_tokens": 10**12}, {"n": 0},
            {"temperature": -1}, {"temperature": "hot"}, {"top_p": 3}, {"top_k": -7}, {"logprobs": 10**6},
            {"logit_bias": {"x": 1}}, {"stop": [3]}, {"structured_outputs": {"regex": "("}},
            {"structured_outputs": {"json": "{"}}, {"response_format": {"type": "unheard of"}},
        )
    ),
    ("/v1/chat/completions", {"model": MODEL, "messages": "Hello"}),
    ("/v1/chat/completions", {"model": MODEL, "messages": [{"role": 3}], "max_tokens": 4}),
    ("/v1/nowhere", {"model": MODEL}),
]  # fmt: skip


async def send(session: aiohttp.ClientSession, host: str, port: int, call: Call) -> Outcome:
    """Make the call.  Never raises for what a server may do: that is in the outcome."""
    start = time.monotonic()

    def outcome(state: str, text: str | None = None, detail: str = "") -> Outcome:
        return Outcome(call, state, time.monotonic() - start, text, detail[:300])

    try:
        if call.kind == "half a body":
            await _half_a_body(host, port, call)
            return outcome("left")
        data = call.body if isinstance(call.body, bytes) else json.dumps(call.body).encode()
        request = session.post(call.path, data=data, headers={"Content-Type": "application/json"})
        if call.kind == "abort":
            try:
                status = await asyncio.wait_for(_status(request), call.leave_after)
            except asyncio.TimeoutError:
                return outcome("left")
            return outcome("answered" if status == 200 else "failed", detail=f"status {status}")
        async with request as response:
            if response.status != 200:
                state = "refused" if 400 <= response.status < 500 else "failed"
                return outcome(state, detail=f"status {response.status}: {await response.text()}")
            if isinstance(call.body, dict) and call.body.get("stream"):
                text, ended = await _read_stream(response, call.leave_after)
                if not ended:
                    response.close()
                    return outcome("left")
            else:
                text = _text(json.loads(await response.read()))
            return outcome("answered", text)
    except (aiohttp.ClientError, asyncio.TimeoutError, OSError, ValueError, KeyError) as error:
        return outcome("failed", detail=f"{type(error).__name__}: {error}")


async def _status(request: AbstractAsyncContextManager[aiohttp.ClientResponse]) -> int:
    async with request as response:
        await response.read()
        return response.status


async def _read_stream(response: aiohttp.ClientResponse, leave_after: float | None) -> tuple[str, bool]:
    """Text so far, and whether the stream came to its end before it was time to leave."""
    parts: list[str] = []
    async for line in response.content:
        if line.startswith(b"data: {"):
            chunk = json.loads(line[6:])
            if "error" in chunk:
                raise ValueError(f"error in the stream: {chunk['error']}")
            parts.append(_text(chunk))
            if leave_after is not None and len(parts) >= leave_after:
                return "".join(parts), False
        elif line.startswith(b"data: [DONE]"):
            return "".join(parts), True
    raise ValueError("the stream ended without [DONE]")


def _text(content: dict[str, Any]) -> str:
    (choice,) = content["choices"]
    if "text" in choice:
        return choice["text"]
    return (choice.get("message") or choice["delta"]).get("content") or ""


async def _half_a_body(host: str, port: int, call: Call) -> None:
    assert isinstance(call.body, bytes)
    _, writer = await asyncio.open_connection(host, port)
    head = f"POST {call.path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {len(call.body)}\r\n\r\n".encode() + call.body[: len(call.body) // 2])
    await writer.drain()
    writer.close()
    await writer.wait_closed()
