"""The attention kernels against their reference in float64, outputs and all gradients: in the interpreter without a GPU."""

import pytest
import torch

from distill.benchmarks.check import relative_errors, tolerance
from students import kernels
from students.kernels import attention
from students.kernels.attention import cases
from students.kernels.attention import kernel as attention_kernel
from students.kernels.attention.cases import Case
from students.kernels.attention.kernel import Config, Tiles
from students.kernels.documents import NOWHERE, PADDING, positions
from students.kernels.op import forced

pytestmark = [  # the interpreter works out both sides of a mask
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:divide by zero encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = Config(Tiles(16, 16, 4, 1), Tiles(16, 16, 4, 1), Tiles(16, 16, 4, 1))
UNEVEN = Config(Tiles(32, 16, 4, 1), Tiles(16, 32, 4, 1), Tiles(32, 16, 4, 1))


def check(run, leaves, fixed, dtype=torch.float32):
    errors = relative_errors(run, attention.reference_attention, leaves, fixed)
    assert max(errors.values()) <= tolerance(dtype), errors


@pytest.mark.parametrize("config", [SMALL, UNEVEN], ids=["small", "uneven"])
@pytest.mark.parametrize(
    "case",
    [
        Case(1, 63, 1, 1, 8, None, 0),
        Case(2, 90, 4, 2, 8, None, 0, packed=True),  # documents bound the search, and some blocks have one document
        Case(2, 100, 2, 1, 8, 16, 4, packed=True),
        Case(1, 200, 2, 1, 8, 16, 4),  # every block adds to the same sinks
        Case(1, 150, 4, 1, 8, 100, 2),  # keys that all queries of a block see
        Case(1, 150, 2, 2, 8, 100, 0, packed=True),
        Case(2, 70, 2, 1, 8, 7, 4, packed=True),  # a window shorter than a block, sinks of documents that begin in it
        Case(1, 60, 2, 1, 8, 1, 1, packed=True),
        Case(1, 170, 2, 1, 8, 20, 70),  # more sinks than a tile of them holds
        Case(1, 60, 2, 1, 8, 20, 40, packed=True, before=120),
        Case(1, 130, 2, 1, 20, 20, 3, packed=True, softcap=5.0),
        Case(2, 5, 2, 1, 8, 16, 4, packed=True, before=35),
        Case(1, 50, 2, 1, 8, 30, 2, packed=True, before=70),
        Case(1, 33, 2, 2, 8, None, 0, packed=True, before=47),
        Case(1, 40, 2, 1, 8, None, 0, before=50),
    ],
    ids=str,
)
def test_attention(case, config):
    check(forced(attention_kernel.attention, config=config), *cases.draw(case, torch.float32, DEVICE))


def test_one_token():
    """Its weight is 1 whatever q and k are: their gradients are nothing."""
    leaves, fixed = cases.draw(Case(2, 1, 2, 1, 8, 4, 0), torch.float32, DEVICE)
    leaves = {name: leaf.requires_grad_() for name, leaf in leaves.items()}
    y = attention_kernel.attention(**leaves, **fixed)
    torch.testing.assert_close(y, leaves["v"].expand_as(y))
    dq, dk, dv = torch.autograd.grad(y.square().sum(), list(leaves.values()))
    assert dq.abs().max() < 1e-5 and dk.abs().max() < 1e-5
    torch.testing.assert_close(dv, 4 * leaves["v"])


def test_half_precision_and_values_of_another_width():
    leaves, fixed = cases.draw(Case(1, 70, 4, 2, 40, 16, 4, packed=True), torch.float16, DEVICE)
    leaves["v"] = leaves["v"][..., :24]  # a view, its rows wider than it
    check(attention_kernel.attention, leaves, fixed, torch.float16)


def test_heads_that_come_as_a_transposed_view():
    leaves, fixed = cases.draw(Case(2, 40, 2, 1, 8, 16, 2, packed=True), torch.float32, DEVICE)
    turned = {name: leaf.transpose(1, 2).contiguous().transpose(1, 2) for name, leaf in leaves.items()}
    torch.testing.assert_close(
        attention_kernel.attention(**turned, **fixed), attention_kernel.attention(**leaves, **fixed), rtol=0, atol=0
    )


@pytest.mark.parametrize("config", [SMALL, UNEVEN], ids=["small", "uneven"])
def test_a_prompt_in_chunks_behind_sinks_that_were_kept(config):
    """Keys as a state keeps them: slots of sinks, one empty, places without a token, the last tokens, then the new ones."""
    window, slots, kept, new = 20, 3, 20, 37
    text, place = torch.tensor([[0] * 70 + [1] * 30]), torch.cat([torch.arange(70), torch.arange(30)])[None]
    first = 43  # text[first:] are the kept and the new tokens
    documents = torch.cat([torch.tensor([[0, 0, NOWHERE, NOWHERE, NOWHERE]]), text[:, first:]], 1).to(DEVICE)
    places = torch.cat([torch.tensor([[0, 1, PADDING, PADDING, PADDING]]), place[:, first:]], 1).to(DEVICE)
    leaves = {"q": torch.randn(1, new, 2, 8, device=DEVICE)}
    leaves |= {name: torch.randn(1, documents.shape[1], 1, 8, device=DEVICE) for name in "kv"}
    fixed = {"scale": 0.3, "softcap": None, "window": window, "sinks": slots, "documents": documents, "positions": places}
    assert documents.shape[1] == slots + 2 + kept + new
    check(forced(attention_kernel.attention, config=config), leaves, fixed)


def test_a_query_that_sees_nothing_gets_zeros():
    leaves, fixed = cases.draw(Case(1, 20, 2, 1, 8, 4, 2), torch.float32, DEVICE)
    wanted = attention.reference_attention(**leaves, **fixed)
    fixed["positions"][:, -1] = PADDING  # no token, its document begins behind it
    leaves = {name: leaf.requires_grad_() for name, leaf in leaves.items()}
    y = attention_kernel.attention(**leaves, **fixed)
    torch.testing.assert_close(y[:, :-1], wanted[:, :-1], rtol=1e-5, atol=1e-5)
    assert not y[:, -1].any()
    assert all(part.isfinite().all() for part in torch.autograd.grad(y.sum(), list(leaves.values())))


def test_which_implementation_serves(caplog):
    caplog.set_level("INFO")
    leaves, fixed = cases.draw(Case(1, 20, 2, 1, 300, 4, 0), torch.float32, DEVICE)
    with kernels.backend("triton"), pytest.raises(kernels.BackendError, match="300 channels are wider than 256"):
        attention.attention(**leaves, **fixed)
    leaves, fixed = cases.draw(Case(1, 20, 2, 1, 8, 4, 300), torch.float32, DEVICE)
    with kernels.backend("triton"), pytest.raises(kernels.BackendError, match="300 sinks are more than 256"):
        attention.attention(**leaves, **fixed)
    leaves, fixed = cases.draw(Case(1, 20, 2, 1, 8, 4, 2), torch.float32, DEVICE)
    with kernels.backend("triton"):
        found = attention.attention(**leaves, **fixed)
    torch.testing.assert_close(found, attention.reference_attention(**leaves, **fixed))


@pytest.mark.parametrize("window", [None, 200, 2**31 - 1])
def test_places_without_documents_and_windows_without_end(window):
    leaves, fixed = cases.draw(Case(1, 100, 2, 1, 8, window, 0), torch.float32, DEVICE)
    places = torch.arange(100, device=DEVICE)[None] % 50
    check(attention_kernel.attention, leaves, fixed | {"positions": places})
    documents = (torch.arange(100, device=DEVICE) >= 50).long()[None]
    check(attention_kernel.attention, leaves, fixed | {"documents": documents})


def test_a_document_that_is_none_is_told_from_one_of_the_lowest_number():
    documents = torch.tensor([[NOWHERE, NOWHERE, 0, 0, 0, 0]], device=DEVICE)
    leaves = {"q": torch.randn(1, 2, 1, 8, device=DEVICE)} | {name: torch.randn(1, 6, 1, 8, device=DEVICE) for name in "kv"}
    options = {
        "scale": 1.0,
        "softcap": None,
        "window": 6,
        "sinks": 0,
        "documents": documents,
        "positions": positions(documents),
    }
    check(attention_kernel.attention, leaves, options)
