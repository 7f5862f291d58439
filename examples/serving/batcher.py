"""Continuous batching: one decoding step at a time over all running requests, each with its own adapter.

It decodes greedily, with one cache of keys and values for the whole batch: requests of different lengths are padded on
the left. A request joins between two steps, after a forward pass over its prompt, and leaves when it has its tokens.
It does not sample, stream, stop at an end token, share the cache of equal prompts, split long prompts, page the cache's
memory or swap requests out, and it takes no model with a sliding attention window.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import DynamicCache

Adapter = str | int  # what bank.use takes: a name, or -1 for the base
Use = Callable[[list[Adapter]], AbstractContextManager[None]]
WINDOW = 10.0  # seconds over which throughput is counted


@dataclass(eq=False)
class Request:
    """A prompt, and what has been written to it.

    Attributes:
        prompt: Token ids.
        wanted: The number of tokens to write.
        adapter: The adapter's name in the bank; -1: the base.
        done: Gets the written tokens.
    """

    prompt: list[int]
    wanted: int
    adapter: Adapter = -1
    done: Future[list[int]] = field(default_factory=Future)
    tokens: list[int] = field(default_factory=list)
    came: float = field(default_factory=time.monotonic)


class Running:
    """The requests of one batch with their cache.

    Attributes:
        requests: B requests.
        mask: (B, L) int64, 0 where a place of the cache is padding.
        cache: Keys and values (B, heads, L, size) per layer.
    """

    def __init__(self, model: nn.Module, use: Use) -> None:
        self._model, self._use = model, use
        self.requests: list[Request] = []
        self.mask = torch.zeros(0, 0, dtype=torch.int64)
        self.cache: list[tuple[Tensor, Tensor]] = []

    def step(self, joining: list[Request]) -> list[Request]:
        """One token for every running request, the first for those that join. Returns what is finished."""
        if self.requests:
            last = torch.tensor([[request.tokens[-1]] for request in self.requests])
            mask = nn.functional.pad(self.mask, (0, 1), value=1)
            self.mask, self.cache = mask, self._forward(self.requests, last, mask, self.cache)
        if joining:
            length = max(len(request.prompt) for request in joining)
            tokens = torch.tensor([[0] * (length - len(request.prompt)) + request.prompt for request in joining])
            mask = torch.tensor([[0] * (length - len(r.prompt)) + [1] * len(r.prompt) for r in joining])
            self._append(joining, mask, self._forward(joining, tokens, mask, []))
        finished = [request for request in self.requests if len(request.tokens) == request.wanted]
        if finished:
            self._keep([at for at, request in enumerate(self.requests) if len(request.tokens) < request.wanted])
        return finished

    @torch.no_grad()
    def _forward(
        self, requests: list[Request], tokens: Tensor, mask: Tensor, cache: list[tuple[Tensor, Tensor]]
    ) -> list[tuple[Tensor, Tensor]]:
        """Append the most likely next token to each request. Returns the cache, longer by `tokens`."""
        device = next(self._model.parameters()).device
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        with self._use([request.adapter for request in requests]):
            output = self._model(
                input_ids=tokens.to(device), attention_mask=mask.to(device), position_ids=positions.to(device),
                past_key_values=DynamicCache(cache or None), use_cache=True, logits_to_keep=1,
            )  # fmt: skip
        for request, token in zip(requests, output.logits[:, -1].argmax(-1).tolist(), strict=True):
            request.tokens.append(token)
        return [(layer.keys, layer.values) for layer in output.past_key_values.layers]

    def _append(self, requests: list[Request], mask: Tensor, cache: list[tuple[Tensor, Tensor]]) -> None:
        """Add requests with their mask and cache, both sides padded on the left to the same length."""
        if not self.requests:
            self.requests, self.mask, self.cache = requests, mask, cache
            return
        length = max(self.mask.shape[1], mask.shape[1])
        self.requests = self.requests + requests
        self.mask = torch.cat([nn.functional.pad(m, (length - m.shape[1], 0)) for m in (self.mask, mask)])
        self.cache = [
            (_stacked(length, keys, more_keys), _stacked(length, values, more_values))
            for (keys, values), (more_keys, more_values) in zip(self.cache, cache, strict=True)
        ]

    def _keep(self, rows: list[int]) -> None:
        """Let the other requests go, with the columns that are padding for all that stay."""
        self.requests = [self.requests[row] for row in rows]
        self.mask = self.mask[rows]
        used = self.mask.any(0).nonzero()
        first = int(used[0]) if len(used) else self.mask.shape[1]
        self.mask = self.mask[:, first:]
        self.cache = [(keys[rows, :, first:], values[rows, :, first:]) for keys, values in self.cache] if rows else []


def _stacked(length: int, *parts: Tensor) -> Tensor:
    """Tensors (B, heads, L, size) below each other, padded on the left to `length`."""
    return torch.cat([nn.functional.pad(part, (0, 0, length - part.shape[2], 0)) for part in parts])


class Batcher:
    """A thread that decodes whatever :meth:`submit` brings.

    Args:
        model: A causal language model of transformers in evaluation mode.
        use: Enters a batch with an adapter per request.
        largest: The most requests in one batch.
        waiting: The most requests that wait to join.
    """

    def __init__(self, model: nn.Module, use: Use, largest: int = 32, waiting: int = 1024) -> None:
        self._running, self._largest = Running(model, use), largest
        self._waiting: queue.Queue[Request] = queue.Queue(waiting)
        self._stopping = threading.Event()
        self._steps: deque[tuple[float, int]] = deque()  # when a step ended, and its tokens
        self._latencies: deque[float] = deque(maxlen=1000)
        self._finished = self._failed = 0
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="batcher")
        self._thread.start()

    def submit(self, request: Request) -> Future[list[int]]:
        """Let a request join. Raises queue.Full where too many wait, RuntimeError after :meth:`stop`."""
        with self._lock:
            if self._stopping.is_set():
                raise RuntimeError("the server is shutting down")
            self._waiting.put_nowait(request)
        return request.done

    def stop(self) -> None:
        """Finish the requests that run or wait, then end the thread."""
        with self._lock:
            self._stopping.set()
        self._thread.join()

    def _run(self) -> None:
        running = self._running
        while running.requests or not self._stopping.is_set() or not self._waiting.empty():
            joining = self._next(self._largest - len(running.requests))
            batch = [*running.requests, *joining]
            if not batch:
                continue
            try:
                finished = running.step(joining)
            except Exception as error:  # the batch's requests fail, and the server goes on with the next ones
                running._keep([])
                with self._lock:
                    self._failed += len(batch)
                for request in batch:
                    request.done.set_exception(error)
                continue
            self._count(len(batch), finished)
            for request in finished:
                request.done.set_result(request.tokens)

    def _next(self, most: int) -> list[Request]:
        """Requests that join now; waits a moment where nothing runs."""
        found: list[Request] = []
        while len(found) < most:
            try:
                idle = not self._running.requests and not found
                request = self._waiting.get(timeout=0.05) if idle else self._waiting.get_nowait()
            except queue.Empty:
                break
            if request.done.set_running_or_notify_cancel():
                found.append(request)
        return found

    def _count(self, tokens: int, finished: list[Request]) -> None:
        now = time.monotonic()
        with self._lock:
            self._steps.append((now, tokens))
            while self._steps[0][0] < now - WINDOW:
                self._steps.popleft()
            self._finished += len(finished)
            self._latencies += [now - request.came for request in finished]

    def stats(self) -> dict[str, float]:
        """Tokens per second and mean batch size over the last ten seconds, latency of the last 1000 requests in ms."""
        now = time.monotonic()
        with self._lock:
            steps = [tokens for when, tokens in self._steps if when > now - WINDOW]
            latencies = torch.tensor([*self._latencies] or [0.0], dtype=torch.float64) * 1000
            return {
                "tokens_per_second": round(sum(steps) / WINDOW, 1),
                "batch_size": round(sum(steps) / max(len(steps), 1), 2),
                "latency_p50_ms": round(latencies.quantile(0.5).item(), 1),
                "latency_p95_ms": round(latencies.quantile(0.95).item(), 1),
                "running": len(self._running.requests),
                "waiting": self._waiting.qsize(),
                "finished": self._finished,
                "failed": self._failed,
            }
