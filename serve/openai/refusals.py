"""Fields that OpenAI and other servers with its API have and this endpoint does not support.

Each table maps a field's name to the reason that a client reads, and to the values that ask for nothing.
"""

from moray.serve.request_body import Refusal

_NO_TOOLS = "is not supported: chats have tools"
_OLD_TOOLS = "is not supported: tools and tool_choice are its newer names"
_NO_CALLS = "is not supported: this endpoint answers /score without tools"
_SPLIT = "false is not supported: the endpoint's setting `reasoning` decides; include_reasoning: false leaves it out"
_NO_BEAMS = "is not supported: this endpoint samples, it does not search"
_TEXT_ONLY = "is not supported: this endpoint reads and writes text only"

_WHITESPACE = (
    'is not supported: JSON is compact; the schema itself may have "x-guidance": {"whitespace_pattern": ...} at its top'
)


def _structured(name: str) -> str:
    return f"is not supported: its newer name is structured_outputs.{name}"


# Fields of every kind of completion.
GENERATION = {
    # OpenAI's
    "audio": Refusal(_TEXT_ONLY),
    "function_call": Refusal(_OLD_TOOLS, ("none", "auto")),
    "functions": Refusal(_OLD_TOOLS, ([],)),
    "modalities": Refusal(_TEXT_ONLY, (["text"],)),
    "moderation": Refusal("is not supported: this endpoint moderates nothing"),
    "prediction": Refusal("is not supported: this endpoint accepts no predicted output"),
    "store": Refusal("is not supported: this endpoint stores nothing", (False,)),
    "suffix": Refusal("is not supported: this endpoint continues a prompt, it does not fill a gap", ("",)),
    "verbosity": Refusal("is not supported: ask for a length in the prompt", ("medium",)),
    "web_search_options": Refusal("is not supported: this endpoint searches no web"),
    # vLLM's and SGLang's
    "allowed_token_ids": Refusal("is not supported: use logit_bias, where -100 bans a token"),
    "bad_words": Refusal("is not supported: use logit_bias, where -100 bans a token", ([],)),
    "cache_salt": Refusal("is not supported: equal prompts of all clients share the cache"),
    "early_stopping": Refusal(_NO_BEAMS, (False,)),
    "ebnf": Refusal(_structured("grammar")),
    "extra_body": Refusal("is an argument of the openai package: in a body its fields are top-level fields", ({},)),
    "guided_choice": Refusal(_structured("choice")),
    "guided_decoding_backend": Refusal("is not supported: there is one backend, llguidance"),
    "guided_grammar": Refusal(_structured("grammar")),
    "guided_json": Refusal(_structured("json")),
    "guided_regex": Refusal(_structured("regex")),
    "guided_whitespace_pattern": Refusal(_WHITESPACE),
    "include_stop_str_in_output": Refusal("true is not supported: the text ends before the stop string", (False,)),
    "json_schema": Refusal(_structured("json")),
    "kv_transfer_params": Refusal("is not supported: no cache is moved between servers"),
    "length_penalty": Refusal(_NO_BEAMS, (1.0,)),
    "logits_processors": Refusal("is not supported: use logit_bias", ([],)),
    "priority": Refusal('is not supported: use service_tier "flex" for requests that may wait', (0,)),
    "prompt_logprobs": Refusal("is not supported: /v1/completions gives them with echo and logprobs"),
    "regex": Refusal(_structured("regex")),
    "request_id": Refusal("is not supported: send the header X-Request-ID"),
    "return_token_ids": Refusal("is not supported: /tokenize gives the ids of a text", (False,)),
    "return_tokens_as_token_ids": Refusal("is not supported: /tokenize gives the ids of a text", (False,)),
    "skip_special_tokens": Refusal("false is not supported: special tokens are not part of the text", (True,)),
    "spaces_between_special_tokens": Refusal("must be true or false", (True, False)),
    "truncate_prompt_tokens": Refusal("is not supported: no prompt is cut; send a shorter one"),
    "use_beam_search": Refusal(_NO_BEAMS, (False,)),
    "vllm_xargs": Refusal("is not supported", ({},)),
}
COMPLETION = GENERATION | {
    "add_special_tokens": Refusal("false is not supported: send token ids, which are used unchanged", (True,)),
    "parallel_tool_calls": Refusal(_NO_TOOLS, (True, False)),
    "reasoning_effort": Refusal("is not supported: chats have it, if the model's chat template does", ("none",)),
    "tool_choice": Refusal(_NO_TOOLS, ("none", "auto")),
    "tools": Refusal(_NO_TOOLS, ([],)),
}
CHAT = GENERATION | {
    "add_generation_prompt": Refusal("false is not supported: the assistant speaks next", (True,)),
    "add_special_tokens": Refusal("true is not supported: the chat template writes them", (False,)),
    "best_of": Refusal("is not supported", (1,)),
    "chat_template": Refusal("is not supported: the checkpoint's own is used"),
    "continue_final_message": Refusal("is not supported: /v1/completions continues a text", (False,)),
    "documents": Refusal("is not supported: put them into a message, or into chat_template_kwargs", ([],)),
    "echo": Refusal("is not supported: /v1/completions has it", (False,)),
    "mm_processor_kwargs": Refusal(_TEXT_ONLY, ({},)),
    "separate_reasoning": Refusal(_SPLIT, (True,)),
    "stream_reasoning": Refusal(_SPLIT, (True,)),
}
# Fields of structured_outputs.
STRUCTURED = {
    "disable_additional_properties": Refusal(
        "is not supported: an object that lists its properties has no others; the schema itself decides for the rest",
        (False,),
    ),
    "disable_any_whitespace": Refusal("false is not supported: JSON is compact", (True,)),
    "disable_fallback": Refusal("must be true or false: there is one backend", (True, False)),
    "structural_tag": Refusal("is not supported: structured_outputs.grammar can have a text around its JSON"),
    "whitespace_pattern": Refusal(_WHITESPACE),
}
FORMATS = {
    "ebnf": "is not supported: structured_outputs.grammar is",
    "grammar": "is not supported: structured_outputs.grammar is",
    "regex": "is not supported: structured_outputs.regex is",
    "structural_tag": "is not supported: structured_outputs.grammar can have a text around its JSON",
}
TOOL_TYPES = {"custom": "is not supported: the input of a custom tool is free text; use a function"}
CHOICE_TYPES = TOOL_TYPES | {"allowed_tools": "is not supported: give those tools alone, and 'auto' or 'required'"}
# Fields of a message: those of another server's answer, which a client may send back.
MESSAGE = {
    "audio": Refusal(_TEXT_ONLY),
    "function_call": Refusal("is not supported: tool_calls is its newer name"),
    "prefix": Refusal("is not supported: /v1/completions continues a text", (False,)),
    "refusal": Refusal("is not supported: put its text into content", ("",)),
}
ROLES = {"function": "is not supported: 'tool' is its newer name"}
SCORE_MESSAGE = MESSAGE | {
    "tool_call_id": Refusal(_NO_CALLS),
    "tool_calls": Refusal(_NO_CALLS, ([],)),
}
SCORE_ROLES = ROLES | {"tool": _NO_CALLS}
_MEDIA = ("audio_url", "file", "image", "image_url", "input_audio", "input_image", "video_url")
PARTS = dict.fromkeys(_MEDIA, "is not supported: the model reads text parts only") | {
    "input_text": "is not supported: in a chat completion it is 'text'",
    "output_text": "is not supported: in a chat completion it is 'text'",
    "refusal": "is not supported: put its text into a text part",
    "thinking": "is not supported: leave it out",
}
SCORE = {
    "early_stopping": Refusal(_NO_BEAMS, (False,)),
    "length_penalty": Refusal(_NO_BEAMS, (1.0,)),
    "num_beams": Refusal(_NO_BEAMS, (1,)),
    "num_return_sequences": Refusal("is not supported: repeat the input, with a seed for each request", (1,)),
}
