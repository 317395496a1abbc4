"""Base of both Mamba-2 mixers: the scan as the exchange between tokens, its state, and its lag.

With a lag of W, the state takes a token only when the token leaves a window of W tokens:

    y_i = C_i . S_{i-W} decayed to i,      S_j = exp(log_a_j) S_{j-1} + x_j B_j^T

A window branch and the state together then see every token once. The same scan kernel serves: it runs over the tokens that
leave the window, with the query C_i at position i - W, and its output is multiplied by the decay from i - W to i.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from students.cache import MixerState, ScopedState, Turn
from students.kernels.documents import NOWHERE
from students.kernels.ssd import ssd, ssd_step, zero_state
from students.kernels.ssm_token import Conv, Gate, Lag, ssm_token
from students.mixers.entering import Entering
from students.mixers.mixer import Context, Matrix, Shape
from students.mixers.projections import group_factors, lost_power, per_head
from students.mixers.recurrent import Recurrent, keep_rows
from students.mixers.transfer import Projections, Transfer
from students.shapes import Float, Int
from students.wrapped import taps


@dataclass(frozen=True)
class StateSpaceParts:
    """Inputs of the scan. q, k and v are its C, B and x before the convolution, for a window branch that borrows them."""

    values: Float[Tensor, "b t h p"]
    B: Float[Tensor, "b t g n"]
    C: Float[Tensor, "b t g n"]
    log_a: Float[Tensor, "b t h"]
    dt: Float[Tensor, "b t h"] | None
    D: Float[Tensor, " h"] | None
    documents: Int[Tensor, "b t"] | None
    q: Float[Tensor, "b t group n"]
    k: Float[Tensor, "b t group n"]
    v: Float[Tensor, "b t head width"]


@dataclass(frozen=True)
class ScanInputs:
    """The arguments of one scan.

    initial: the state before, in generation. decay: with a lag, the decay of the output from the token that enters to the
    token that reads. kept: further tensors that the state keeps for the next call.
    """

    x: Float[Tensor, "b t h p"]
    log_a: Float[Tensor, "b t h"]
    B: Float[Tensor, "b t g n"]
    documents: Int[Tensor, "b t"] | None
    initial: Float[Tensor, "b h p n"] | None
    decay: Float[Tensor, "b t h"] | None = None
    kept: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class TokenInputs:
    """One token's inputs of `ssm_token`. activation: the convolution's; rope: how C and B are rotated."""

    x: Float[Tensor, "b 1 c"]
    decay: Float[Tensor, "b 1 h"]
    activation: str | None = None
    stock: tuple[Float[Tensor, " h"], Float[Tensor, " h"]] | None = None
    gate: Gate | None = None
    rope: str | None = None


class StateSpace(Recurrent):
    """Base of mixers whose exchange between tokens is `ssd`.

    A subclass has `in_proj`, whose last rows are those of B, C and `rows_after` others, and `conv1d`, whose last channels
    are those of B and C.
    """

    orientable = True
    lends = True
    copied = ("in_proj", "out_proj")
    zero_options = frozenset({"lag"})
    meanings = {
        "d_state": "Channels of B and C. Default: the width of an attention head.",
        "d_conv": "Taps of the convolution.",
        "lag": "Number of latest tokens that are not in the state yet. With a `window`, the window's own `lag` sets it.",
    }
    rows_after = 0
    in_proj: nn.Linear
    conv1d: nn.Conv1d
    D: nn.Parameter

    def __init__(self, shape: Shape, d_state: int | None, lag: int) -> None:
        super().__init__(shape)
        self.d_state = shape.head_dim if d_state is None else d_state
        self.norm_eps = shape.norm_eps
        self.min_lag = self.horizon = self.lag = lag

    def memory_range(self) -> tuple[float, float]:
        """No half-life is shorter than the lag: otherwise tokens would have decayed before they can be read."""
        shortest, longest = super().memory_range()
        return max(shortest, self.lag), max(longest, 8.0 * self.lag)

    def mix(self, parts: StateSpaceParts, context: Context) -> Float[Tensor, "b t h p"]:
        x = parts.values if parts.dt is None else parts.values * parts.dt[..., None].to(parts.values.dtype)
        scan = self._behind_window(x, parts, context) if self.lag else self._whole(x, parts, context)
        if scan.initial is None or x.shape[1] > 1:
            y, final = ssd(scan.x, scan.log_a, scan.B, parts.C, scan.documents, scan.initial)
        else:
            y, final = ssd_step(scan.x[:, 0], scan.log_a[:, 0], scan.B[:, 0], parts.C[:, 0], scan.initial)
            y = y[:, None]
        if context.state is not None:
            context.state.write(ssm=final, **scan.kept)
        if scan.decay is not None:
            y = y * scan.decay[..., None].to(y.dtype)
        return y if parts.D is None else y + parts.D.to(y.dtype)[:, None] * parts.values

    def _whole(self, x: Float[Tensor, "b t h p"], parts: StateSpaceParts, context: Context) -> ScanInputs:
        """Scan inputs without a lag: every token enters the state at once."""
        initial = None
        if context.state is not None:
            initial = context.state.read("ssm")
            initial = zero_state(x, parts.B) if initial is None else keep_rows(initial, context.resumed(x))
        return ScanInputs(x, parts.log_a, parts.B, parts.documents, initial)

    def _behind_window(self, x: Float[Tensor, "b t h p"], parts: StateSpaceParts, context: Context) -> ScanInputs:
        """Scan inputs with a lag: a token enters the state when it leaves the window; `decay` covers the time between."""
        documents = context.ids(x) if parts.documents is None else parts.documents
        new = {"x": x, "B": parts.B, "log_a": parts.log_a, "documents": documents}
        joined = {name: torch.cat([before, new[name]], 1) for name, before in self._queue(new, context).items()}
        time = x.shape[1]
        gone = {name: part[:, :time] for name, part in joined.items()}
        by_head = joined["log_a"].transpose(1, 2).contiguous()  # running sums along strides are far slower on a GPU
        elapsed = by_head.double().cumsum(2).transpose(1, 2)
        decay = (elapsed[:, self.lag :] - elapsed[:, :time]).exp()
        decay = decay * (documents == gone["documents"])[..., None]
        state, initial, kept = context.state, None, {}
        if state is not None:
            initial = state.read("ssm")
            if initial is None:
                initial = zero_state(x, parts.B)
            else:
                initial = keep_rows(initial, state.kept("ssm_document") == gone["documents"][:, 0])
            kept = {f"queue_{name}": part[:, time:] for name, part in joined.items()}
            kept["ssm_document"] = gone["documents"][:, -1]
        return ScanInputs(gone["x"], gone["log_a"], gone["B"], gone["documents"], initial, decay, kept)

    def _queue(self, new: dict[str, Tensor], context: Context) -> dict[str, Tensor]:
        """The tokens still inside the window, oldest first; empty places have the document NOWHERE."""
        queue = {}
        for name, part in new.items():
            kept = None if context.state is None else context.state.read(f"queue_{name}")
            if kept is None:
                kept = part.new_zeros(part.shape[0], self.lag, *part.shape[2:])
                kept = torch.full_like(kept, NOWHERE) if name == "documents" else kept
            queue[name] = kept.to(part.dtype)
        return queue

    def token_features(
        self, entering: Entering, context: Context, share: Float[Tensor, "b terms"] | None = None
    ) -> Float[Tensor, "b 1 h p"]:
        """share: see `ssm_token.Gate`."""
        token, state = self.token_inputs(entering), context.held
        gate = token.gate if token.gate is None else token.gate._replace(share=share)
        weight, bias = taps(self.conv1d, token.x)
        lag = None
        if self.lag:
            x, B, log_a, elapsed = (state.kept(name) for name in ("queue_x", "queue_B", "queue_log_a", "elapsed"))
            lag = Lag(x, B, log_a, elapsed)
        y = ssm_token(
            token.x[:, 0],
            token.decay[:, 0],
            Conv(weight, bias, token.activation, state.kept("conv")),
            self.D,
            state.kept("ssm"),
            context.column,
            entering.x.dtype,
            stock=token.stock,
            gate=gate,
            lag=lag,
            rope=None if token.rope is None else (*context.tables, token.rope),
        )
        y = self.token_end(y[:, None], entering)
        if share is not None and gate is None:
            y = y * (2 * share.sigmoid()).to(y.dtype).repeat_interleave(y.shape[2] // share.shape[1], 1)[:, None, :, None]
        return y

    def token_inputs(self, entering: Entering) -> "TokenInputs":
        """The inputs of `ssm_token` for one token, from the input's projections and the parameters."""
        raise NotImplementedError

    def token_end(self, y: Float[Tensor, "b 1 h p"], entering: Entering) -> Float[Tensor, "b 1 h p"]:
        """The part of `features` that `ssm_token` does not compute with its gate."""
        return y

    def lent(self, entering: Entering) -> tuple[Tensor, Tensor, Tensor]:
        """C, B and x of one token before the convolution, each [b h p], for a window branch that borrows them."""
        raise NotImplementedError

    def hold(self, state: MixerState | ScopedState, turn: Turn, tokens: int) -> None:
        """Turn the queue into rings too, and add a running sum of its decays.

        Entries of documents other than the one that continues are cleared here once, so no token needs to check them.
        """
        super().hold(state, turn, tokens)
        x = state.read("queue_x")
        if x is None:
            return
        goes_on = _going_on(state, x)
        alive = state.kept("queue_documents") == goes_on[:, None]
        log_a, ssm = state.kept("queue_log_a"), state.kept("ssm")
        entered = keep_rows(ssm, state.kept("ssm_document") == goes_on).to(ssm.dtype)
        state.write(
            ssm=entered,
            queue_x=turn.laid(x * alive[..., None, None], self.lag + 1),
            queue_B=turn.laid(state.kept("queue_B"), self.lag + 1),
            queue_log_a=turn.laid(log_a, self.lag + 1),
            elapsed=log_a.double().sum(1, keepdim=True).repeat(1, 2, 1),
        )

    def give_back(self, state: MixerState | ScopedState, turn: Turn, steps: int) -> None:
        super().give_back(state, turn, steps)
        x = state.read("queue_x")
        if x is None:
            return
        state.write(
            **{name: turn.taken(state.kept(name), self.lag, steps) for name in ("queue_x", "queue_B", "queue_log_a")}
        )
        state.drop("elapsed")
        if steps:
            documents = state.kept("queue_documents")
            documents = torch.cat([documents, _going_on(state, x)[:, None].expand(-1, steps)], 1)
            state.write(ssm_document=documents[:, steps - 1].clone(), queue_documents=documents[:, steps:].clone())

    def attention_rows(
        self, attention: Projections, groups: int, transfer: Transfer
    ) -> tuple[Float[Tensor, "h p e"], Float[Tensor, "g n e"], Float[Tensor, "g n e"], str]:
        """Rows for x from attention's v (one set for each head), rows for B and C from k and q (one set for each group), and
        a text for the record: how B and C were made, and what was lost.

        A bias is one more column (e = d + 1), for an input that is always 1. The softmax scale and the linear parts of norms
        on q and k are folded in. The projections used are added to `transfer.used`.
        """
        rows = self.head_rows(attention, transfer)
        q, k = rows["q"], rows["k"]
        C, B = group_factors(q, k, groups, self.d_state, self.sharing)
        how = "copied" if self.d_state >= self.head_dim else f"rank-{self.d_state} factors of the logits"
        if groups < self.n_heads:
            how = f"rank-{self.d_state} factors of the mean logits of {self.n_heads // groups} heads a group"
        folded = " (their norms' weights folded in)" if attention.q_norm is not None else ""
        loses = groups < self.n_heads or self.d_state < self.head_dim
        lost = f", {lost_power(q, k, C, B):.1%} of the logits' power lost" if loses else ""
        return rows["v"], B, C, f"B and C {how} from k and q{folded}{lost}, softmax scale in C"

    @torch.no_grad()
    def match_norms(
        self, h: Float[Tensor, "b t d"], q: Float[Tensor, "b t h p"], k: Float[Tensor, "b t kv p"], transfer: Transfer
    ) -> None:
        """Give C and B the mean size, on these inputs, that attention's norms give q and k."""
        if self.qk_norm is None:
            return
        parts = self.project(h, Context.unrotated(h, self.head_dim))
        groups = parts.q.shape[2]
        own_bias = self.get_parameter("conv1d.bias")
        bias = (own_bias / self.conv1d.weight[:, 0, -1])[-2 * groups * self.d_state :]
        B_bias, C_bias = bias.unflatten(0, (2, groups, -1))
        wanted_C, wanted_B = self.logit_scale * _size(q), per_head(_size(k), self.n_heads)
        C = wanted_C.unflatten(0, (groups, -1)).mean(1) / _size(parts.q + C_bias).clamp_min(1e-12)
        B = wanted_B.unflatten(0, (groups, -1)).mean(1) / _size(parts.k + B_bias).clamp_min(1e-12)
        if self.d_state < self.head_dim or groups < self.n_heads:  # C and B are factors: only their product has a known size
            C = B = (C * B).sqrt()
        factors = torch.cat([B, C]).repeat_interleave(self.d_state)
        own_bias[-len(factors) :] *= factors
        stop = self.in_proj.out_features - self.rows_after
        self.in_proj.weight[stop - len(factors) : stop] *= factors[:, None]
        sizes = f"C x {C.mean():.3g}, B x {B.mean():.3g} on average over heads"
        transfer.add("in_proj.weight", f"the norms of q and k replaced by their mean size on real inputs ({sizes})")

    def semiseparable(self, parts: StateSpaceParts) -> Matrix:
        """The scan's matrix, with dt folded into B, and B and C of each group repeated for its heads."""
        repeat = parts.log_a.shape[2] // parts.B.shape[2]
        B, C = (part.repeat_interleave(repeat, 2) for part in (parts.B, parts.C))
        if parts.dt is not None:
            B = B * parts.dt[..., None].to(B.dtype)
        return Matrix(C, B, parts.log_a, parts.D)


def _going_on(state: MixerState | ScopedState, like: Tensor) -> Int[Tensor, " b"]:
    """The document that each row continues."""
    last = state.last_document
    return torch.zeros(len(like), dtype=torch.long, device=like.device) if last is None else last


def _size(x: Float[Tensor, "b t h p"]) -> Float[Tensor, " h"]:
    """The root mean square of the lengths of each head's vectors."""
    return x.square().sum(-1).mean((0, 1)).sqrt()
