"""The router's messages to records and back. What comes off the wire is checked here before it is used."""

from moecluster.errors import Exhausted, InvalidMessage
from moecluster.proto import router_pb2, tensor_pb2
from moecluster.rpc.fields import checked_name
from moecluster.types import ExpertId, GenerationPiece, GenerationRequest, RouterStatus

MAX_PROMPT_CHARACTERS = 2**20
MAX_PROMPT_IDS = 2**18
MAX_NEW_TOKENS = 2**16
MAX_TEMPERATURE = 100.0
MAX_TOP_K = 2**20


def encode_generation_request(request: GenerationRequest) -> router_pb2.GenerateRequest:
    """The message of a request."""
    return router_pb2.GenerateRequest(
        request_id=request.request_id,
        prompt=request.prompt,
        prompt_ids=request.prompt_ids,
        max_new_tokens=request.max_new_tokens,
        temperature=request.temperature,
        top_p=request.top_p,
        top_k=request.top_k,
        seed=request.seed,
    )


def decode_generation_request(message: router_pb2.GenerateRequest) -> GenerationRequest:
    """The request of a message. Raises InvalidMessage, or Exhausted for what is too large, naming the field."""
    if len(message.prompt) > MAX_PROMPT_CHARACTERS:
        raise Exhausted(f"prompt: {len(message.prompt)} characters, at most {MAX_PROMPT_CHARACTERS}")
    if len(message.prompt_ids) > MAX_PROMPT_IDS:
        raise Exhausted(f"prompt_ids: {len(message.prompt_ids)} ids, at most {MAX_PROMPT_IDS}")
    if message.max_new_tokens > MAX_NEW_TOKENS:
        raise Exhausted(f"max_new_tokens: {message.max_new_tokens}, at most {MAX_NEW_TOKENS}")
    if bool(message.prompt) == bool(message.prompt_ids):
        raise InvalidMessage("prompt: give either a text that is not empty, or prompt_ids")
    if message.max_new_tokens < 1:
        raise InvalidMessage(f"max_new_tokens: {message.max_new_tokens}, at least 1")
    if not 0 <= message.temperature <= MAX_TEMPERATURE:  # false for NaN too
        raise InvalidMessage(f"temperature: {message.temperature}, not within 0 and {MAX_TEMPERATURE:g}")
    if not 0 <= message.top_p <= 1:
        raise InvalidMessage(f"top_p: {message.top_p}, not within 0 and 1")
    if not 0 <= message.top_k <= MAX_TOP_K:
        raise InvalidMessage(f"top_k: {message.top_k}, not within 0 and {MAX_TOP_K}")
    return GenerationRequest(
        request_id=checked_name(message.request_id, "request_id"),
        prompt=message.prompt,
        prompt_ids=tuple(message.prompt_ids),
        max_new_tokens=message.max_new_tokens,
        temperature=message.temperature,
        top_p=message.top_p,
        top_k=message.top_k,
        seed=message.seed,
    )


def encode_piece(piece: GenerationPiece) -> router_pb2.GenerateReply:
    """The message of a piece."""
    return router_pb2.GenerateReply(
        ids=piece.ids,
        text=piece.text,
        finish_reason=piece.finish_reason,
        prompt_tokens=piece.prompt_tokens,
        experts=[
            router_pb2.ExpertCount(
                expert=tensor_pb2.ExpertRef(layer=expert.layer, index=expert.index), assignments=assignments
            )
            for expert, assignments in piece.experts.items()
        ],
    )


def decode_piece(message: router_pb2.GenerateReply) -> GenerationPiece:
    """The piece of a message."""
    return GenerationPiece(
        ids=tuple(message.ids),
        text=message.text,
        finish_reason=message.finish_reason,
        prompt_tokens=message.prompt_tokens,
        experts={ExpertId(layer=e.expert.layer, index=e.expert.index): e.assignments for e in message.experts},
    )


def encode_router_status(status: RouterStatus) -> router_pb2.RouterStatus:
    """The message of a router's status."""
    return router_pb2.RouterStatus(
        router=status.router,
        model=status.model,
        placement_term=status.placement[0],
        generation=status.placement[1],
        running=status.running,
        rss_bytes=status.rss_bytes,
    )


def decode_router_status(message: router_pb2.RouterStatus) -> RouterStatus:
    """A router's status of a message."""
    return RouterStatus(
        router=message.router,
        model=message.model,
        placement=(message.placement_term, message.generation),
        running=message.running,
        rss_bytes=message.rss_bytes,
    )
