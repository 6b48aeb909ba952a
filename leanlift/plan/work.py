"""What a training step has to compute and to move, counted from the shapes of a fake model.

Counts, no times: multiplications and additions of matrix products (2 T m n for T tokens and an m x
n matrix), and bytes that go through a card's memory and over its bus. `time` makes seconds of them.

Left out: the first block's input gradients that nobody needs (they are counted), routers, norms'
arithmetic, kernels' launches, the host's own work, images, generation.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from leanlift.layers.tiled_mlp import pieces

TOUCHES = 3
"""How often what enters and leaves a product is read or written by what is between products (norms,
activations, residuals), in a forward pass; in a backward pass twice that."""

FUSED_TOUCHES = 1.2
"""The same where norms, rotary embeddings and gated products are one kernel each, which reads what
it is given and writes what it gives: in a block of Llama-2-7B, with norms (4 d), residuals (6 d),
rotary embeddings (4 d) and the gated product (8 d), 22 d numbers a token beside 19 d that enter and
leave products."""

LOGIT_TOUCHES = 10
"""How often a logit in fp32 is read or written: the loss goes over the vocabulary twice."""

LOSS_PRODUCTS = 3
"""Of the head: the logits twice, and the gradient of the hidden states."""

ATTENTION_BACK = 2.5
"""Products of a fused attention's backward pass, by those of its forward pass: five and two."""


@dataclass(frozen=True)
class Matrix:
    """A frozen matrix, or a stack of experts.

    Attributes:
        block: number of the block that it is in; None: in none.
        m, n: its shape, all experts of a stack one above the other.
        entries: that are trained.
        share: of a stack, the share of its rows that a token meets.
        held: bytes of the stored form.
        made: whether its numbers are made anew for each use.
        in_pieces: whether it is used for each piece of a long row (`layers.tiled_mlp`).
    """

    block: int | None
    m: int
    n: int
    entries: int
    share: float
    held: int
    made: bool
    in_pieces: bool = False


@dataclass(frozen=True)
class ModelWork:
    """What a model has to compute.

    Attributes:
        matrices: in the order in which they stand in the model.
        attention: of each block, the numbers of all its heads, and how far a token looks back;
            None: as far as there are tokens.
        recomputable: blocks that checkpointing can compute again, one by one.
        head: vocabulary and width.
    """

    matrices: tuple[Matrix, ...]
    attention: tuple[tuple[int, int | None], ...]
    recomputable: int
    head: tuple[int, int]


@dataclass(frozen=True)
class Part:
    """A part of a step.

    Attributes:
        products: FLOP of matrix products.
        attention: FLOP of the products in attention.
        traffic: bytes read or written in the card's memory beside products.
        bus: bytes over the bus meanwhile.
    """

    products: float = 0
    attention: float = 0
    traffic: float = 0
    bus: float = 0

    def __add__(self, other: Part) -> Part:
        return Part(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(Part)))


@dataclass(frozen=True)
class StepWork:
    """The work of an optimizer's step.

    Attributes:
        times: micro-batches.
        tokens: of a micro-batch.
        forward, loss, recomputed, backward: of each of them.
        optimizer: of its step.
        recomputable: blocks of the model that could be kept.
    """

    times: int
    tokens: int
    forward: Part
    loss: Part
    recomputed: Part
    backward: Part
    optimizer: Part
    recomputable: int


@dataclass(frozen=True)
class Running:
    """The settings of a step that decide its work.

    Attributes:
        rows, tokens: of a micro-batch, and of a row.
        trained: tokens that the loss is over.
        times: micro-batches of a step.
        checkpointing: whether blocks are recomputed.
        kept: how many are not.
        offloading: whether what blocks are given waits in the host's memory.
        item, value: bytes of a number, and of a trained offset.
        streamed: bytes of blocks that are brought from the host's memory.
        learned: bytes of what is learned in them, where that is brought too.
        state: bytes of the optimizer's state.
        reuses: whether weights that are made to recompute blocks serve the backward pass.
        mlp_tokens: of a piece of a long row at most, where MLPs take it in pieces.
        fused: whether norms, rotary embeddings and gated products are one kernel each.
    """

    rows: int
    tokens: int
    trained: int
    times: int
    checkpointing: bool
    kept: int
    offloading: bool
    item: int
    value: int
    streamed: int
    learned: int
    state: int
    reuses: bool = False
    mlp_tokens: int | None = None
    fused: bool = False


# --- the step -------------------------------------------------------------------------------


def step_work(model: ModelWork, run: Running) -> StepWork:
    """The work of a step."""
    again, made_again = _recomputed(model, run), recomputed_in(model, run)
    forward, recomputed, backward = Part(), Part(), Part()
    for place, matrix in enumerate(model.matrices):
        forward += _product(matrix, run)
        twice = place in made_again
        recomputed += _product(matrix, run) if twice else Part()
        there = twice and run.reuses and matrix.share == 1
        backward += _product(matrix, run, 2, there) + _gradient(matrix, run)
    for block, (width, window) in enumerate(model.attention):
        attention = Part(attention=_attention_flop(width, window, run))
        forward += attention
        backward += Part(attention=ATTENTION_BACK * attention.attention)
        recomputed += attention if block in again else Part()
    bus = Part(bus=_streamed(model, run) + _offloaded(model, run, again))
    back = Part(bus=_written(model, run))
    return StepWork(
        times=run.times,
        tokens=run.rows * run.tokens,
        forward=forward + bus,
        loss=_loss(model.head, run),
        recomputed=recomputed,
        backward=backward + bus + back,
        optimizer=_optimizer(model, run),
        recomputable=model.recomputable,
    )


def _recomputed(model: ModelWork, run: Running) -> range:
    """The blocks that are computed again."""
    blocks = len(model.attention)
    return range(max(0, blocks - run.kept) if run.checkpointing else 0)


def recomputed_in(model: ModelWork, run: Running) -> set[int]:
    """The places of the matrices that are multiplied with once more in the backward pass: of a
    block that is recomputed all but the last, whose product nobody needs then."""
    again = _recomputed(model, run)
    last = {matrix.block: place for place, matrix in enumerate(model.matrices)}
    places = {p for p, matrix in enumerate(model.matrices) if matrix.block in again}
    return places - set(last.values())


def _product(matrix: Matrix, run: Running, passes: int = 1, is_there: bool = False) -> Part:
    """A product with a matrix whose numbers are made, if they have to be and are not there yet, and
    what is between products, as often touched as `passes` say."""
    traffic = made_nbytes(matrix, run, is_there) + passes * touched_nbytes(matrix, run)
    return Part(products=product_flop(matrix, run), traffic=traffic)


def product_flop(matrix: Matrix, run: Running) -> float:
    """FLOP of a product of all tokens with a matrix, or of one as large."""
    return 2 * run.rows * run.tokens * matrix.share * matrix.m * matrix.n


def made_nbytes(matrix: Matrix, run: Running, is_there: bool = False) -> float:
    """Bytes that are read and written to have a matrix's numbers, as often as a product needs it:
    read where they are there, else made of what is stored, and patched."""
    numbers, made = matrix.m * matrix.n, float(matrix.held)
    if matrix.made:
        made += 2 * numbers * run.item + matrix.entries * (1 + run.value + 2 * run.item)
    if is_there:
        made = numbers * run.item
    if matrix.in_pieces:
        made *= len(pieces(run.rows * run.tokens, run.mlp_tokens))
    return made


def touched_nbytes(matrix: Matrix, run: Running) -> float:
    """Bytes of what enters and leaves a product, as often as what is between products touches it in
    a forward pass."""
    touches = FUSED_TOUCHES if run.fused else TOUCHES
    return touches * run.rows * run.tokens * matrix.share * (matrix.m + matrix.n) * run.item


def _gradient(matrix: Matrix, run: Running) -> Part:
    """The gradient of a matrix's values: on a card a dense product, of which they are picked."""
    if not matrix.entries:
        return Part()
    return Part(products=product_flop(matrix, run), traffic=picked_nbytes(matrix, run))


def picked_nbytes(matrix: Matrix, run: Running) -> float:
    """Bytes of a dense gradient that is written, and of the entries that are picked from it."""
    picked = matrix.entries * (1 + run.item + run.value)
    return 2 * matrix.m * matrix.n * run.item + picked


def _attention_flop(width: int, window: int | None, run: Running) -> float:
    """Two products, over the tokens before each one alone."""
    length = run.tokens
    seen = length * length / 2
    if window is not None and window < length:
        seen = length * window - window * window / 2
    return 4 * run.rows * seen * width


def _loss(head: tuple[int, int], run: Running) -> Part:
    vocabulary, width = head
    logits = run.trained * vocabulary
    read = LOSS_PRODUCTS * vocabulary * width * run.item
    return Part(LOSS_PRODUCTS * 2 * logits * width, 0, LOGIT_TOUCHES * 4 * logits + read)


def _optimizer(model: ModelWork, run: Running) -> Part:
    """Values and state are read and written, gradients read."""
    entries = sum(matrix.entries for matrix in model.matrices)
    return Part(traffic=3 * run.value * entries + 2 * run.state)


def _streamed(model: ModelWork, run: Running) -> float:
    """Bytes of blocks that are brought in a pass: two are there at each turn."""
    blocks = max(1, len(model.attention))
    return (run.streamed + run.learned) * max(0, blocks - 2) / blocks


def _written(model: ModelWork, run: Running) -> float:
    """Bytes that go back to the host from a backward pass: sums of gradients, where there are some,
    and from the last one of a step the values and moments that it updates; their mean."""
    if not run.learned:
        return 0
    values = run.value * sum(matrix.entries for matrix in model.matrices)
    return (values if run.times > 1 else 0) + (run.state + values) / run.times


def _offloaded(model: ModelWork, run: Running, again: range) -> float:
    """Bytes that wait in the host's memory: what recomputed blocks are given, or, where nothing is
    recomputed, what enters each product."""
    if not run.offloading:
        return 0
    tokens = run.rows * run.tokens * run.item
    if run.checkpointing:
        return len(again) * tokens * model.head[1]
    return tokens * sum(matrix.n * matrix.share for matrix in model.matrices)
