"""A local server that speaks Ollama's and OpenAI's wire formats: deterministic captions, and faults on demand.

A caption is a function of the picture's bytes (and of the seed, above temperature 0). Faults are given by the number of
the caption request (from 1), for every request from some number on, or by the SHA-256 of a picture:

    429 500 503   that status, with Ollama's words        hang       no answer until the client gives up
    400 404 413 422   likewise                            reset      the connection is closed without an answer
    refusal       the model will not                      die        the server is gone from then on
    truncated     cut off, end "length"                   redirect   307 to ``redirect_to``
    empty         no text                                 html       a login page, status 200
    short         a few words                             same       the same caption for every picture
    loop          the model is caught in a loop           preamble   "Here is a description ..."
    thinks        closed reasoning before the caption     thinking   reasoning of its own, and no text
    thought       reasoning that is not opened            chatty     "Is there anything else you need?"
    filtered      withheld by the server's filter (OpenAI)

A question that follows in a conversation is answered with one sentence of its own; ``short_fault`` is that of all such.

``python tests/prep/caption_server.py --port 0`` runs one as a process and prints its URL; ``--log FILE`` gets one JSON
object per request. Formats: docs/api.md and server/routes.go of ollama/ollama; OpenAI's API reference.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import os
import random
import signal
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

MODEL = "gemma3:27b"
DIGEST = "a418f5838eaf7fe2cfe0a3046c8384b68ba43a4435542c942f9db00a5f342203"
BUSY = "server busy, please try again.  maximum pending requests exceeded"  # Ollama's ErrMaxQueue
HANG = 3600.0  # seconds

WORDS = (
    "red blue green yellow black white grey brown tall short slim broad young old bright dark soft hard long wide "
    "narrow woollen cotton leather striped plain checked left right upper lower wooden metal glass stone paper curly "
    "straight loose tight open closed raised lowered bent stretched near distant shallow deep warm cool pale vivid"
)
THINGS = (
    "jacket shirt coat hat scarf belt shoe boot glove bag table chair window door wall floor lamp book cup bottle "
    "flower tree bench street car bicycle dog cat hand arm leg shoulder face eye ear hair collar sleeve pocket button"
)
VERBS = "holds shows carries touches covers faces meets follows leaves crosses frames hides lights fills"


def caption(picture: bytes, seed: int = 0, words: int = 80) -> str:
    """About ``words`` words of grammatical nonsense that depends on the bytes and the seed alone."""
    choose = random.Random(hashlib.sha256(picture + str(seed).encode()).digest())
    qualities, things, verbs = WORDS.split(), THINGS.split(), VERBS.split()
    sentences: list[str] = []
    while sum(len(sentence.split()) for sentence in sentences) < words:
        first, second = (" ".join([*choose.sample(qualities, 2), choose.choice(things)]) for _ in range(2))
        sentences.append(f"The {first} {choose.choice(verbs)} a {second}.")
    return " ".join(sentences)


SPOILT = {
    "refusal": "I'm sorry, but I can't help with describing this image.",
    "empty": "",
    "short": "A person.",
    "same": caption(b"every picture"),
    "loop": "A person stands " + "in the middle of the frame with both arms raised and " * 12 + "nothing else.",
}
AROUND = {
    "thinks": "<think>\nI can't see a face, so I begin with the coat.\n</think>\n\n{}",
    "thought": "One person, one wall.\n</think>\n\n{}",
    "thinking": "",
    "chatty": "{} Is there anything else you need?",
}
STATUSES = {"413": "request too large", "422": "cannot process the image"}
STATUSES |= {"400": "invalid image", "404": "model 'x' not found", "429": "too many requests", "503": BUSY}
STATUSES["500"] = "model runner has unexpectedly stopped, this may be due to resource limitations or an internal error"


class CaptionServer:
    """The server, in threads of this process; ``log`` holds one dict per request in the order of their arrival.

    ``loaded``: as Ollama, it keeps its model on the GPU from the first question until it is asked to unload it, unless
    it is ``stubborn``.

    ``slots`` requests are answered at a time, each in ``seconds``; others wait, as with Ollama's OLLAMA_NUM_PARALLEL.
    """

    def __init__(
        self,
        port: int = 0,
        model: str = MODEL,
        digest: str = DIGEST,
        seconds: float = 0.0,
        slots: int = 4,
        words: int = 80,
        log_file: str | None = None,
    ) -> None:
        self.model, self.digest, self.seconds, self.words = model, digest, seconds, words
        self.log: list[dict[str, Any]] = []
        self.faults: dict[int, str] = {}
        self.poison: dict[str, str] = {}
        self.always: tuple[int, str] | None = None  # from the Nth request on
        self.short_fault: str | None = None
        self.redirect_to = ""
        self.loaded = self.stubborn = False
        self.as_process = False
        self._slots = threading.Semaphore(slots)
        self._lock = threading.Lock()
        self._asked = 0
        self._log_file = log_file
        self._stopping = threading.Event()
        self._open: set[Any] = set()
        outer = self

        class OwnHandler(self.handler_class()):
            server_of_tests = outer

        self._http = ThreadingHTTPServer(("127.0.0.1", port), OwnHandler)
        self._http.daemon_threads = True
        self._http.block_on_close = False
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    def handler_class(self) -> type[Handler]:
        """What answers requests."""
        return Handler

    def __enter__(self) -> CaptionServer:
        return self

    def __exit__(self, *exception: object) -> None:
        self.die()

    @property
    def captioned(self) -> list[dict[str, Any]]:
        """The requests about pictures that were answered with a status of 200."""
        return [entry for entry in self.log if entry.get("status") == 200 and entry["image"]]

    def die(self) -> None:
        """Stop listening and drop every connection, as a server that was killed."""
        if self.as_process:
            os.kill(os.getpid(), signal.SIGKILL)
        self._stopping.set()
        self._http.shutdown()
        self._http.server_close()
        for connection in list(self._open):
            connection.close()

    def next_fault(self, image: str) -> str | None:
        """The fault of the request about a picture that has just come in; counts it."""
        with self._lock:
            self._asked += 1
            if self.always and self._asked >= self.always[0]:
                return self.always[1]
            return self.faults.get(self._asked) or self.poison.get(image)

    def note(self, entry: dict[str, Any]) -> None:
        """Log a request."""
        with self._lock:
            self.log.append(entry)
            if self._log_file:
                with open(self._log_file, "a", encoding="utf-8") as file:
                    file.write(json.dumps(entry) + "\n")

    def answer(self, picture: bytes, fault: str | None, options: dict[str, Any], after: str = "") -> tuple[str, str]:
        """The text about a picture, or about what was said before, and why it ended."""
        seed = options.get("seed", 0) if options.get("temperature") else 0
        text = caption(picture + after.encode(), seed, 1 if after else self.words)
        if fault == "truncated":
            return text[: len(text) // 2], "length"
        if fault == "preamble":
            return "Here is a detailed description of the image: " + text, "stop"
        if fault in AROUND:
            return AROUND[fault].format(text), "length" if fault == "thinking" else "stop"
        return SPOILT.get(fault or "", text), "stop"


class Handler(BaseHTTPRequestHandler):
    """Answers the requests of one connection."""

    server_of_tests: CaptionServer
    protocol_version = "HTTP/1.1"

    def setup(self) -> None:
        super().setup()
        self.server_of_tests._open.add(self.connection)

    def finish(self) -> None:
        self.server_of_tests._open.discard(self.connection)
        super().finish()

    def log_message(self, *arguments: object) -> None:
        """Nothing: tests read ``log``."""

    def do_GET(self) -> None:
        server = self.server_of_tests
        entry = self._entry()
        if self.path == "/api/version":
            self._send(entry, 200, {"version": "0.12.0"})
        elif self.path == "/api/ps":
            held = [{"name": server.model, "model": server.model, "size_vram": 20_000_000_000}]
            self._send(entry, 200, {"models": held if server.loaded else []})
        elif self.path == "/api/tags":
            details = {"format": "gguf", "family": "gemma3", "parameter_size": "27.4B", "quantization_level": "Q4_K_M"}
            model = {"name": server.model, "model": server.model, "modified_at": "2026-01-01T00:00:00Z"}
            model |= {"size": 17396936941, "digest": server.digest, "details": details}
            self._send(entry, 200, {"models": [model]})
        elif self.path == "/v1/models":
            model = {"id": server.model, "object": "model", "created": 1767225600, "owned_by": "library"}
            self._send(entry, 200, {"object": "list", "data": [model]})
        else:
            self._send(entry, 404, {"error": "404 page not found"})

    do_HEAD = do_GET

    def do_POST(self) -> None:
        server = self.server_of_tests
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        openai = self.path == "/v1/chat/completions"
        if self.path == "/api/generate" and not body.get("prompt") and body.get("keep_alive") == 0:
            server.loaded = server.stubborn
            answer = {"model": body["model"], "created_at": "2026-01-01T00:00:00Z", "response": "", "done": True}
            return self._send(self._entry(), 200, answer | {"done_reason": "unload"})
        if not openai and self.path != "/api/chat":
            return self._send(self._entry(), 404, {"error": "404 page not found"})
        first, *others = body["messages"]
        assert [turn["role"] for turn in others] in ([], ["assistant", "user"])
        if openai:
            parts = first["content"]
            asked = next(part["text"] for part in parts if part["type"] == "text")
            url = next(part["image_url"]["url"] for part in parts if part["type"] == "image_url")
            picture = base64.b64decode(url.removeprefix("data:image/jpeg;base64,"), validate=True)
            body["think"] = None
            options = {"num_predict": body["max_tokens"], "seed": body["seed"], "temperature": body["temperature"]}
        else:
            asked, options = first["content"], body.get("options", {})
            picture = base64.b64decode(first["images"][0], validate=True)
        prompt, *before = [turn["content"] for turn in others[::-1]] + [asked]
        image = hashlib.sha256(picture).hexdigest()
        fault = server.next_fault(image) or (server.short_fault if before else None)
        entry = self._entry(image=image, options=options, model=body["model"], prompt=prompt, fault=fault)
        entry["before"] = before[::-1]  # the question and the answer before
        entry["think"] = body.get("think")
        if body["model"] != server.model:
            return self._send(entry, 404, {"error": f"model '{body['model']}' not found"})
        if fault in STATUSES:
            return self._send(entry, int(fault), {"error": STATUSES[fault]})
        if fault == "redirect":
            return self._send(entry, 307, {}, {"Location": server.redirect_to + self.path})
        if fault == "html":
            return self._send(entry, 200, "<html><body>Please log in</body></html>")
        if fault in ("hang", "reset", "die"):
            server.note(entry | {"status": 0})
            if fault == "hang":
                server._stopping.wait(HANG)
            elif fault == "die":
                threading.Thread(target=server.die).start()
                server._stopping.wait(HANG)
            self.close_connection = True
            return None
        with server._slots:
            server.loaded = True
            if server.seconds:
                time.sleep(server.seconds)
            text, end = server.answer(picture, fault, options, before[0] if before else "")
        entry["answer"] = text
        self._send(entry, 200, self._completion(openai, text, end, fault))
        return None

    def _completion(self, openai: bool, text: str, end: str, fault: str | None) -> dict[str, Any]:
        model, tokens = self.server_of_tests.model, len(text.split())
        if openai:
            message = {"role": "assistant", "content": text}
            if fault == "thinking":
                message["reasoning_content"] = "One person, one wall"
            if fault == "filtered":
                message["content"], end = "", "content_filter"
            choice = {"index": 0, "message": message, "finish_reason": end}
            usage = {"prompt_tokens": 500, "completion_tokens": tokens, "total_tokens": 500 + tokens}
            answer = {"id": "chatcmpl-1", "object": "chat.completion", "created": 1767225600, "model": model}
            return answer | {"system_fingerprint": "fp_ollama", "choices": [choice], "usage": usage}
        answer = {"model": model, "created_at": "2026-01-01T00:00:00.000000Z", "done": True, "done_reason": end}
        answer["message"] = {"role": "assistant", "content": text}
        if fault == "thinking":
            answer["message"]["thinking"] = "One person, one wall"
        durations = {"total_duration": 7, "load_duration": 1, "prompt_eval_duration": 2, "eval_duration": 4}
        return answer | durations | {"prompt_eval_count": 500, "eval_count": tokens}

    def _entry(self, **fields: Any) -> dict[str, Any]:
        about = {"method": self.command, "path": self.path, "authorization": self.headers.get("Authorization")}
        return about | {"image": None} | fields

    def _send(
        self, entry: dict[str, Any], status: int, body: dict[str, Any] | str, headers: dict[str, str] | None = None
    ) -> None:
        data = (body if isinstance(body, str) else json.dumps(body)).encode()
        try:
            self.send_response(status)
            self.send_header("Content-Type", "text/html" if isinstance(body, str) else "application/json")
            self.send_header("Content-Length", str(len(data)))
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)
        except OSError:  # who asked has gone
            status = 0
        self.server_of_tests.note(entry | {"status": status})


def main() -> None:
    """Run one server until it is killed."""
    parser = argparse.ArgumentParser(description="A caption server for tests")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--digest", default=DIGEST)
    parser.add_argument("--seconds", type=float, default=0.0, help="that a caption takes")
    parser.add_argument("--slots", type=int, default=4, help="captions at a time")
    parser.add_argument("--words", type=int, default=80, help="of a caption")
    parser.add_argument("--fault", action="append", default=[], metavar="N=FAULT", help="of the Nth caption request")
    parser.add_argument("--always", metavar="N=FAULT", help="of the Nth caption request and all that follow")
    parser.add_argument("--poison", action="append", default=[], metavar="SHA256=FAULT", help="of one picture")
    parser.add_argument("--redirect-to", default="", metavar="URL")
    parser.add_argument("--log", metavar="FILE")
    arguments = parser.parse_args()
    server = CaptionServer(
        arguments.port, arguments.model, arguments.digest, arguments.seconds, arguments.slots, arguments.words,
        arguments.log,
    )  # fmt: skip
    server.as_process, server.redirect_to = True, arguments.redirect_to
    server.faults = {int(number): fault for number, _, fault in (text.partition("=") for text in arguments.fault)}
    server.poison = {image: fault for image, _, fault in (text.partition("=") for text in arguments.poison)}
    if arguments.always:
        number, _, fault = arguments.always.partition("=")
        server.always = (int(number), fault)
    print(server.url, flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main()
