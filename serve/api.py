"""The FastAPI application: every path of the endpoint."""

from pathlib import Path
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException

from serve import azure
from serve.endpoint import Endpoint
from serve.guard import Guard
from serve.keys import Keys
from serve.openai.chat import chat, conversation
from serve.openai.completions import complete
from serve.openai.errors import ApiError
from serve.openai.responses import (
    GENERATING,
    GUARDED,
    ChatReply,
    CompletionReply,
    Model,
    ModelList,
    State,
    Text,
    Tokens,
    replies,
)
from serve.openai.schemas import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody

PAGES = Path(__file__).parent / "page"


def _endpoint(request: Request) -> Endpoint:
    endpoint: Endpoint = request.app.state.endpoint
    return endpoint


Served = Annotated[Endpoint, Depends(_endpoint)]


def create_app(endpoint: Endpoint, keys: Keys) -> FastAPI:
    app = FastAPI(title="moray", docs_url=None, redoc_url=None, openapi_url="/openapi.json")
    app.state.endpoint = endpoint
    app.add_middleware(
        Guard,
        keys=keys,
        max_body_bytes=endpoint.args.max_body_bytes,
        is_public=endpoint.args.is_public,
        requests=endpoint.metrics.requests,
    )
    _add_error_handlers(app)
    _add_model_routes(app)
    _add_operator_routes(app)
    return app


def _add_model_routes(app: FastAPI) -> None:
    @app.post("/v1/completions", responses=replies(*GENERATING, ok=CompletionReply, stream=True))
    async def completions(endpoint: Served, body: CompletionBody, request: Request) -> Response:
        """Continue prompts, as OpenAI's completions do."""
        return await complete(endpoint, body, request)

    @app.post("/v1/chat/completions", responses=replies(*GENERATING, ok=ChatReply, stream=True))
    async def chat_completions(endpoint: Served, body: ChatBody, request: Request) -> Response:
        """Answer a conversation, as OpenAI's chat completions do."""
        return await chat(endpoint, body, request)

    @app.post("/score", responses=replies(*GENERATING, ok=list[dict[str, str]]))
    async def score(endpoint: Served, body: azure.ScoreBody, request: Request) -> Response:
        """Generate text, in Azure ML's schema."""
        return await azure.score(endpoint, body, request)

    @app.get("/v1/models", responses=replies(*GUARDED, ok=ModelList))
    async def models(endpoint: Served) -> dict[str, Any]:
        """The one model that is here."""
        return {"object": "list", "data": [_model(endpoint)]}

    @app.get("/v1/models/{name}", responses=replies(*GUARDED, 404, ok=Model))
    async def model(endpoint: Served, name: str) -> dict[str, Any]:
        endpoint.check_model(name)
        return _model(endpoint)

    @app.post("/tokenize", responses=replies(*GUARDED, 400, 404, ok=Tokens))
    async def tokenize(endpoint: Served, body: TokenizeBody) -> dict[str, Any]:
        """The token ids that a prompt or a conversation becomes."""
        endpoint.check_model(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise ApiError(400, "invalid_parameter", "give one of prompt and messages", param="prompt")
        if body.prompt is not None:
            (tokens,) = await endpoint.encode_prompts([body.prompt])
        else:
            (tokens,) = await endpoint.encode_chats([conversation(body.messages or [])])
        return {"tokens": tokens, "count": len(tokens), "max_model_len": endpoint.max_model_len}

    @app.post("/detokenize", responses=replies(*GUARDED, 400, 404, ok=Text))
    async def detokenize(endpoint: Served, body: DetokenizeBody) -> dict[str, Any]:
        """The text of token ids, without special tokens."""
        endpoint.check_model(body.model)
        endpoint.check_token_ids(body.tokens)
        return {"prompt": endpoint.tokenizer.decode(body.tokens)}


def _add_operator_routes(app: FastAPI) -> None:
    @app.get("/health", responses=replies(ok=State) | {503: {"model": State, "description": "it failed"}})
    async def health(endpoint: Served) -> JSONResponse:
        """200 while the engine runs."""
        failed = endpoint.engine.failure is not None
        return JSONResponse({"status": "failed" if failed else "ok"}, 503 if failed else 200)

    @app.get("/ready", responses=replies(ok=State) | {503: {"model": State, "description": "not any more"}})
    async def ready(endpoint: Served) -> JSONResponse:
        """200 while requests are taken."""
        can = endpoint.engine.is_open
        return JSONResponse({"status": "ready" if can else "closed"}, 200 if can else 503)

    @app.get("/metrics", response_class=PlainTextResponse, responses=replies(*GUARDED))
    async def metrics(endpoint: Served) -> Response:
        """Prometheus metrics of the replica that answers."""
        return Response(endpoint.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/", include_in_schema=False)
    async def page() -> HTMLResponse:
        return HTMLResponse((PAGES / "index.html").read_text())

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse((PAGES / "docs.html").read_text())


def _model(endpoint: Endpoint) -> dict[str, Any]:
    return {
        "id": endpoint.args.model_name,
        "object": "model",
        "created": endpoint.created,
        "owned_by": "moray",
        "max_model_len": endpoint.max_model_len,
    }


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def api_error(_: Request, error: ApiError) -> Response:
        return error.response

    @app.exception_handler(RequestValidationError)
    async def bad_body(_: Request, error: RequestValidationError) -> Response:
        return ApiError.of_body(error.errors()).response

    @app.exception_handler(HTTPException)
    async def bad_route(request: Request, error: HTTPException) -> Response:
        codes = {404: "not_found", 405: "method_not_allowed"}
        code = codes.get(error.status_code, "invalid_request")
        message = f"{request.method} {request.url.path}: {error.detail}"
        return ApiError(error.status_code, code, message, headers=error.headers).response
