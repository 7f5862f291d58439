"""Serve a causal language model with many tCUR adapters over HTTP: each request names its adapter, one batch has many.

    python examples/serve_adapters.py --random 8                              # a small model, nothing downloaded
    python examples/serve_adapters.py --model runs/llama/base --adapters FOLDER
    python examples/serve_adapters.py --load-test 30                          # its own server and clients, one table

    curl -X POST localhost:8000/generate -H 'content-type: application/json' \
         -d '{"adapter": "random-0", "prompt": "once upon", "new_tokens": 16}'

GET / is a page with throughput and latency, GET /stats the same as JSON. GET /adapters lists the adapters, POST
/adapters adds one ({"name", "file"}, or {"name", "seed"} for random cores), PUT /adapters/NAME replaces one and DELETE
/adapters/NAME removes one. There is no authentication: it listens on this machine alone unless --host says otherwise.
Needs transformers, fastapi and uvicorn; for --load-test httpx.
"""

from __future__ import annotations

import argparse
import asyncio
import queue
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, nullcontext
from pathlib import Path
from typing import Annotated, Any

import torch
import uvicorn
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import HTMLResponse, JSONResponse
from pydantic import BaseModel, Field
from serving import batcher
from serving.shelf import Shelf, Unknown
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    ByT5Tokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers import logging as transformers_logging

import tcurlora_ext as tcur

PAGE = (Path(__file__).parent / "serving" / "page.html").read_text()


class Generate(BaseModel):
    """What POST /generate takes; the prompt is text or token ids."""

    adapter: str | None = None
    prompt: Annotated[str, Field(min_length=1)] | Annotated[list[int], Field(min_length=1)]
    new_tokens: int = Field(default=16, ge=1)


class Replacement(BaseModel):
    """What PUT /adapters/NAME takes: a file in the folder of adapters, or a seed for random cores."""

    file: str | None = None
    seed: int = 0


class Addition(Replacement):
    """What POST /adapters takes."""

    name: str = Field(min_length=1, max_length=100)


def make_app(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, shelf: Shelf | None, options: argparse.Namespace
) -> FastAPI:
    """The server.

    Args:
        model: A causal language model in evaluation mode.
        tokenizer: Reads prompts that are text.
        shelf: The model's adapters; None: the model has none (the load test's plain base).
        options: ``batch``: the most requests in one batch; ``max_tokens``: the most tokens of prompt and answer.
    """
    use: batcher.Use = (lambda ids: nullcontext()) if shelf is None else shelf.bank.use
    decoding = batcher.Batcher(model, use, options.batch)

    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(decoding.stop)

    app = FastAPI(title="Adapters of one base", lifespan=life)

    @app.exception_handler(Unknown)
    @app.exception_handler(FileNotFoundError)
    def not_found(_: Request, error: Exception) -> JSONResponse:
        return JSONResponse({"detail": str(error)}, 404)

    @app.exception_handler(ValueError)
    def refused(_: Request, error: Exception) -> JSONResponse:
        return JSONResponse({"detail": str(error)}, 400)

    @app.exception_handler(Exception)
    def failed(_: Request, error: Exception) -> JSONResponse:
        return JSONResponse({"detail": f"{type(error).__name__}: {error}"}, 500)

    def adapters() -> Shelf:
        if shelf is None:
            raise ValueError("this server has no adapters")
        return shelf

    def tokens_of(body: Generate) -> list[int]:
        tokens: list[int]
        if isinstance(body.prompt, str):
            tokens = tokenizer(body.prompt, add_special_tokens=False)["input_ids"]
        else:
            tokens = body.prompt
        wrong = [token for token in tokens if not 0 <= token < model.config.vocab_size]
        if wrong:
            raise ValueError(
                f"prompt has the token {wrong[0]}, expected tokens from 0 to {model.config.vocab_size - 1}"
            )
        if len(tokens) + body.new_tokens > options.max_tokens:
            raise ValueError(
                f"the prompt has {len(tokens)} tokens and new_tokens is {body.new_tokens}, together "
                f"{len(tokens) + body.new_tokens}: expected at most {options.max_tokens}"
            )
        return tokens

    @app.post("/generate")
    async def generate(body: Generate) -> dict[str, Any]:
        tokens = tokens_of(body)
        version = None if body.adapter is None else adapters().take(body.adapter)
        request = batcher.Request(tokens, body.new_tokens, -1 if version is None else version)
        if version is not None:  # let go when the batch has ended with it, also where this client has gone
            request.done.add_done_callback(lambda _: adapters().let_go(version))
        try:
            decoding.submit(request)
        except (queue.Full, RuntimeError) as error:
            request.done.cancel()
            raise HTTPException(503, str(error) or "too many requests wait: try again later") from None
        written = await asyncio.wrap_future(request.done)
        text = tokenizer.decode(written, skip_special_tokens=True)
        return {"adapter": body.adapter, "version": version, "tokens": written, "text": text}

    @app.get("/adapters")
    def listed() -> dict[str, list[str]]:
        return {"adapters": [] if shelf is None else shelf.names}

    @app.post("/adapters", status_code=201)
    def add(body: Addition) -> dict[str, str]:
        return {"version": adapters().put(body.name, body.file, body.seed, new=True)}

    @app.put("/adapters/{name}")
    def replace(name: str, body: Replacement) -> dict[str, str]:
        return {"version": adapters().put(name, body.file, body.seed, new=False)}

    @app.delete("/adapters/{name}")
    def remove(name: str) -> dict[str, str]:
        adapters().remove(name)
        return {"removed": name}

    @app.get("/stats")
    def stats() -> dict[str, float]:
        held = {"adapters": 0, "adapter_bytes": 0}
        if shelf is not None:
            held = {"adapters": len(shelf.names), "adapter_bytes": shelf.bank.nbytes}
        return decoding.stats() | held

    @app.get("/", response_class=HTMLResponse)
    def page() -> str:
        return PAGE

    return app


def base_model(options: argparse.Namespace) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model of --model, or a Llama with random weights that reads bytes."""
    if options.model is not None:
        model = AutoModelForCausalLM.from_pretrained(options.model)
        tokenizer = AutoTokenizer.from_pretrained(options.model)
    else:
        torch.manual_seed(0)
        tokenizer = ByT5Tokenizer()  # one token per byte, no vocabulary file
        config = LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=options.hidden, intermediate_size=3 * options.hidden,
            num_hidden_layers=options.layers, num_attention_heads=4, max_position_embeddings=1024,
            bos_token_id=None, eos_token_id=None, pad_token_id=None, initializer_range=0.1,
        )  # fmt: skip
        model = LlamaForCausalLM(config)
    options.max_tokens = min(options.max_tokens, model.config.max_position_embeddings)
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval(), tokenizer


def adapted(model: PreTrainedModel, rank: int) -> PreTrainedModel:
    """The model, adapted in place: every layer has a core of its own, the form that costs least in a batch of many."""
    tcur.inject(model, tcur.TCURConfig.preset("light", rank=rank))
    return model.eval()


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the model and serve it, or test it under load."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a causal language model on the hub or in a folder")
    parser.add_argument(
        "--adapters", type=Path, help="a folder with files of tcur.save_adapter; all of them are loaded"
    )
    parser.add_argument("--random", type=int, default=0, help="add so many random adapters, random-0, random-1, ...")
    parser.add_argument("--rank", type=int, default=8, help="rank of all adapters, that of the files")
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch", type=int, default=32, help="the most requests in one batch")
    parser.add_argument("--max-tokens", type=int, default=512, help="the most tokens of prompt and answer together")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--load-test", type=float, metavar="SECONDS", help="measure for so many seconds, then end")
    parser.add_argument("--clients", type=int, default=32, help="of the load test, requests at the same time")
    parser.add_argument("--many", type=int, default=64, help="of the load test, adapters beside those that change")
    options = parser.parse_args(arguments)
    transformers_logging.set_verbosity_error()
    try:
        model, tokenizer = base_model(options)
    except OSError as error:
        parser.error(f"--model {options.model}: {error}")
    if options.load_test is not None:
        from serving import load_test

        load_test.run(model, tokenizer, options, make_app, adapted)
        return
    shelf = Shelf(adapted(model, options.rank), options.adapters)
    for number in range(options.random):
        shelf.put(f"random-{number}", None, number, new=True)
    for file in sorted(options.adapters.glob("*.safetensors")) if options.adapters else ():
        shelf.put(file.stem, file.name, 0, new=True)
    uvicorn.run(make_app(model, tokenizer, shelf, options), host=options.host, port=options.port, log_level="info")


if __name__ == "__main__":
    main()
