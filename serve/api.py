"""create_app builds the FastAPI application with every path of the endpoint."""

from pathlib import Path
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException

from moray.serve import azure
from moray.serve.batches import BatchService
from moray.serve.endpoint import Caller, Endpoint
from moray.serve.errors import ApiError
from moray.serve.guard import RequestGuardMiddleware
from moray.serve.keys import Keys
from moray.serve.openai.batches import FILES, router
from moray.serve.openai.chat import start_chat, template_variables
from moray.serve.openai.completions import start_completion
from moray.serve.openai.messages import conversation
from moray.serve.openai.responses import (
    GENERATING,
    GUARDED,
    ChatCompletionResponse,
    CompletionResponse,
    Model,
    ModelList,
    ServerState,
    Text,
    Tokens,
    describe_responses,
)
from moray.serve.openai.schemas import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody
from moray.serve.openai.streaming import respond

PAGES = Path(__file__).parent / "page"
# Status -> code and message of the requests that Starlette refuses before they reach a route.
REASONS = {
    400: ("invalid_json", "the body is not JSON in UTF-8, or is nested too deeply"),
    404: ("not_found", "this endpoint has no such path; /docs lists those it has"),
    405: ("method_not_allowed", "this path does not support that method; /docs lists those it does"),
}


def _endpoint(request: Request) -> Endpoint:
    endpoint: Endpoint = request.app.state.endpoint
    return endpoint


def _caller(request: Request) -> Caller:
    return Caller(request.state.key)


EndpointDep = Annotated[Endpoint, Depends(_endpoint)]
CallerDep = Annotated[Caller, Depends(_caller)]


def create_app(endpoint: Endpoint, keys: Keys, batches: BatchService | None = None) -> FastAPI:
    """Build the application of one endpoint, behind RequestGuardMiddleware and, where origins are given, CORS.

    batches: keeps files and batches; None = the endpoint offers none
    """
    app = FastAPI(title="moray", docs_url=None, redoc_url=None, openapi_url="/openapi.json")
    app.state.endpoint = endpoint
    app.state.batches = batches
    app.add_middleware(
        RequestGuardMiddleware,
        keys=keys,
        max_body_bytes=endpoint.args.max_body_bytes,
        streamed={FILES: endpoint.args.max_file_bytes},
        is_public=endpoint.args.is_public,
        requests=endpoint.metrics.requests,
    )
    if endpoint.args.cors_origins:  # outside the guard: a browser's preflight request comes without a key
        app.add_middleware(
            CORSMiddleware,
            allow_origins=endpoint.args.cors_origins,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=["Retry-After", "X-Request-ID"],
        )
    _add_error_handlers(app)
    _add_model_routes(app)
    app.include_router(router)
    _add_operator_routes(app)
    return app


def _add_model_routes(app: FastAPI) -> None:
    @app.post("/v1/completions", responses=describe_responses(*GENERATING, ok=CompletionResponse, stream=True))
    async def completions(endpoint: EndpointDep, body: CompletionBody, caller: CallerDep) -> Response:
        """Continue prompts, as OpenAI's completions do."""
        return await respond(await start_completion(endpoint, body, caller), is_stream=bool(body.stream))

    @app.post("/v1/chat/completions", responses=describe_responses(*GENERATING, ok=ChatCompletionResponse, stream=True))
    async def chat_completions(endpoint: EndpointDep, body: ChatBody, caller: CallerDep) -> Response:
        """Answer a conversation, as OpenAI's chat completions do."""
        return await respond(await start_chat(endpoint, body, caller), is_stream=bool(body.stream))

    @app.post("/score", responses=describe_responses(*GENERATING, ok=list[dict[str, str]]))
    async def score(endpoint: EndpointDep, body: azure.ScoreBody, caller: CallerDep) -> Response:
        """Generate text, in Azure ML's schema."""
        return await azure.score(endpoint, body, caller)

    @app.get("/v1/models", responses=describe_responses(*GUARDED, ok=ModelList))
    async def models(endpoint: EndpointDep) -> dict[str, Any]:
        """List the one model of this endpoint."""
        return {"object": "list", "data": [_model(endpoint)]}

    @app.get("/v1/models/{name}", responses=describe_responses(*GUARDED, 404, ok=Model))
    async def model(endpoint: EndpointDep, name: str) -> dict[str, Any]:
        """Describe the model of this endpoint by its name."""
        endpoint.check_model(name)
        return _model(endpoint)

    @app.post("/tokenize", responses=describe_responses(*GUARDED, 400, 404, ok=Tokens))
    async def tokenize(endpoint: EndpointDep, body: TokenizeBody) -> dict[str, Any]:
        """Encode a prompt or a conversation to token ids."""
        endpoint.check_model(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise ApiError(400, "invalid_parameter", "give one of prompt and messages", param="prompt")
        if body.prompt is not None:
            (tokens,) = await endpoint.encode_prompts([body.prompt])
        else:
            variables = template_variables(endpoint, body.chat_template_kwargs or {})
            messages = conversation(endpoint.tokenizer, body.messages or [])
            (tokens,) = await endpoint.encode_chats([messages], variables=variables)
        return {"tokens": tokens, "count": len(tokens), "max_model_len": endpoint.max_model_len}

    @app.post("/detokenize", responses=describe_responses(*GUARDED, 400, 404, ok=Text))
    async def detokenize(endpoint: EndpointDep, body: DetokenizeBody) -> dict[str, Any]:
        """Decode token ids to text, without special tokens."""
        endpoint.check_model(body.model)
        endpoint.check_token_ids(body.tokens)
        return {"prompt": endpoint.tokenizer.decode(body.tokens)}


def _add_operator_routes(app: FastAPI) -> None:
    @app.get(
        "/health",
        responses=describe_responses(ok=ServerState)
        | {503: {"model": ServerState, "description": "the engine failed"}},
    )
    async def health(endpoint: EndpointDep) -> JSONResponse:
        """Return 200 while the engine runs, 503 after it failed."""
        failed = endpoint.engine.failure is not None
        return JSONResponse({"status": "failed" if failed else "ok"}, 503 if failed else 200)

    @app.get(
        "/ready",
        responses=describe_responses(ok=ServerState) | {503: {"model": ServerState, "description": "it is closed"}},
    )
    async def ready(endpoint: EndpointDep) -> JSONResponse:
        """Return 200 while requests are accepted, 503 after."""
        is_open = endpoint.engine.is_open
        return JSONResponse({"status": "ready" if is_open else "closed"}, 200 if is_open else 503)

    @app.get("/metrics", response_class=PlainTextResponse, responses=describe_responses(*GUARDED))
    async def metrics(endpoint: EndpointDep, request: Request) -> Response:
        """Return the Prometheus metrics of the replica that answers."""
        batches: BatchService | None = request.app.state.batches
        open_counts = {} if batches is None else await batches.open_counts()
        return Response(endpoint.metrics.text(open_counts), media_type="text/plain; version=0.0.4; charset=utf-8")

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
        return ApiError.from_body_errors(error.errors()).response

    @app.exception_handler(HTTPException)
    async def bad_route(request: Request, error: HTTPException) -> Response:
        code, reason = REASONS.get(error.status_code, ("invalid_request", error.detail))
        message = f"{request.method} {request.url.path}: {reason}"
        return ApiError(error.status_code, code, message, headers=error.headers).response
