"""Life of an optimizer around its steps, in every way to run it: loading in any order, surgery, other engines."""

import copy
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from common import beside, slow_but
from shampoo3d import StepRefusedError

from .fsdp import Sharding, with_torch
from .harness import needs_deepspeed, run
from .models import Shape
from .settings import shampoo
from .training import Session, data_parallel, one_process, prepare_deepspeed
from .zero import Recipe, Zero, with_zero

SHAPE = Shape()
SAVED, STEPS = 2, 4
MAKE = shampoo("default", "float32")
WAYS = ["plain", "ddp", "fsdp2", *(f"zero{stage}" for stage in range(4)), "zero1-bf16"]
Weights = dict[str, Tensor]


def _session(way: str) -> Session:
    if way == "plain":
        session = one_process(SHAPE, MAKE)
        session.module.float()
        return session
    if way == "ddp":
        return data_parallel(SHAPE, MAKE, dtype=torch.float32)
    if way == "fsdp2":
        return with_torch(SHAPE, Sharding(shards=2), MAKE, torch.float32)
    stage, *precision = way.removeprefix("zero").split("-")
    return with_zero(SHAPE, Zero(int(stage), precision=precision[0] if precision else "float32"), Recipe(MAKE))


def _differing(found: Weights, expected: Weights) -> list[str]:
    return [name for name, weight in found.items() if not torch.equal(weight, expected[name])]


# ---- loading ----


def _by_folder(session: Session, path: Path, *, saving: bool) -> None:
    (session.optimizer.save_checkpoint if saving else session.optimizer.load_checkpoint)(path)


def _by_engine(session: Session, path: Path, *, saving: bool) -> None:
    (session.engine.save_checkpoint if saving else session.engine.load_checkpoint)(str(path))


def _loaded(way: str, through: Callable[..., None], folder: Path) -> dict[str, list[str]]:
    """Names of the parameters that are not, to the bit, as if nothing had been loaded, after each way to load."""
    session = _session(way).train(0, SAVED)
    through(session, folder / "saved", saving=True)
    at_once = session.train(SAVED, STEPS).weights()
    found = {}

    def goes_on(what: str, of: Session) -> None:
        found[what] = _differing(of.train(SAVED, STEPS).weights(), at_once)

    through(session, folder / "saved", saving=False)
    goes_on("into the running one", session)
    through(session, folder / "saved", saving=False)
    through(session, folder / "saved", saving=False)
    goes_on("twice in a row", session)
    fresh = _session(way)
    through(fresh, folder / "saved", saving=False)
    goes_on("into a new one", fresh)
    bound = _session(way)
    bound.optimizer.bind()
    through(bound, folder / "saved", saving=False)
    goes_on("after bind()", bound)
    return found


@needs_deepspeed
@pytest.mark.parametrize("way", slow_but(["zero2"], WAYS))
def test_a_folder_loads_at_any_time(way: str, tmp_path: Path) -> None:
    for found in run(_loaded, 1 if way == "plain" else 2, way, _by_folder, tmp_path):
        assert not any(found.values()), found


@needs_deepspeed
@pytest.mark.parametrize("way", slow_but(["zero1-bf16"], WAYS[3:]))
def test_an_engines_checkpoint_loads_at_any_time(way: str, tmp_path: Path) -> None:
    for found in run(_loaded, 2, way, _by_engine, tmp_path):
        assert not any(found.values()), found


# ---- surgery ----


def _foreign(session: Session) -> list[bool]:
    """Entries of a wrapper in the state, by the tensors of the groups, stay in steps and when they are saved."""
    optimizer, found = session.optimizer, []
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for k, p in enumerate(params):
        optimizer.state[p]["mine"] = torch.full((2,), k)
    for change in (lambda: session.train(1, 2), optimizer.state_dict, lambda: session.train(2, 3)):
        change()
        found.append(all(bool((optimizer.state[p]["mine"] == k).all()) for k, p in enumerate(params)))
    saved = optimizer.state_dict()["state"]
    return [*found, all(bool((saved[k]["mine"] == k).all()) for k in range(len(params)))]


def _by_dictionary(session: Session) -> list[bool]:
    """A rate of zero in new dictionaries counts."""
    optimizer, before = session.optimizer, session.weights()
    rates = [group["lr"] for group in optimizer.param_groups]
    optimizer.param_groups[:] = [{**group, "lr": 0.0} for group in optimizer.param_groups]
    still = not _differing(session.train(1, 2).weights(), before)
    optimizer.param_groups[:] = [{**g, "lr": lr} for g, lr in zip(optimizer.param_groups, rates, strict=True)]
    return [still, bool(_differing(session.train(2, 3).weights(), before))]


def _begun_anew(session: Session) -> list[bool]:
    """Without state all begin anew."""
    session.optimizer.state = defaultdict(dict)
    session.train(1, 2)
    return [state["step"] == 1 for state in session.optimizer.state.values() if "step" in state]


def _begun_anew_on_one_rank(session: Session) -> list[bool]:
    optimizer = session.optimizer
    if dist.get_rank() == 0:
        next(state for state in optimizer.state.values() if "step" in state).clear()
    try:
        session.train(1, 2)
    except StepRefusedError as error:
        return ["the step of " in str(error), "is 0 on rank 0 and 1 on rank 1" in str(error)]
    return [False]


def _resized_on_one_rank(session: Session) -> list[bool]:
    parameter = session.module.get_parameter(next(name for name, p in session.module.named_parameters() if p.dim() > 1))
    before = parameter.data
    session.train(1, 2)
    if dist.get_rank() == 0:
        parameter.data = torch.cat([before, before])
        parameter.grad = torch.ones_like(parameter)
    try:
        session.optimizer.step()
    except StepRefusedError as error:
        parameter.data, parameter.grad = before, None
        session.train(2, 3)
        return ["has shape" in str(error), "had " in str(error)]
    return [False]


def _surgery(way: str, change: Callable[[Session], list[bool]]) -> list[bool]:
    return change(_session(way).train(0, 1))


@needs_deepspeed
@pytest.mark.parametrize("way", slow_but(["fsdp2", "zero1-bf16"], ["ddp", "fsdp2", "zero2", "zero3", "zero1-bf16"]))
@pytest.mark.parametrize("change", [_foreign, _by_dictionary, _begun_anew], ids=lambda of: of.__name__)
def test_what_the_user_does_counts(way: str, change: Callable[[Session], list[bool]]) -> None:
    for found in run(_surgery, 2, way, change):
        assert found
        assert all(found)


@pytest.mark.parametrize(
    ("way", "change"),
    beside([("ddp", _begun_anew_on_one_rank), ("ddp", _resized_on_one_rank)], [("fsdp2", _begun_anew_on_one_rank)]),
)
def test_what_one_rank_does_is_refused_by_all(way: str, change: Callable[[Session], list[bool]]) -> None:
    for found in run(_surgery, 2, way, change):
        assert found
        assert all(found)


# ---- engines that come and go ----


def _plainly(module: nn.Module, steps: Iterable[int]) -> None:
    """Train with replicas by hand."""
    optimizer = MAKE(module.parameters())
    for step in steps:
        session = Session(SHAPE, module, optimizer)
        session.train(step, step + 1)


def _destroyed(first: str, then: str) -> bool:
    """A model whose engine is gone goes on as a copy of it does that has never seen one."""
    session = _session(first).train(0, 2)
    session.engine.destroy()
    twin = one_process(SHAPE, MAKE).module.float()
    with torch.no_grad():
        for mine, theirs in zip(twin.parameters(), session.module.parameters(), strict=True):
            mine.copy_(theirs)
    _plainly(twin, range(2, 4))
    if then == "plain":
        _plainly(session.module, range(2, 4))
        return not _differing(session.weights(), dict(twin.named_parameters()))
    import deepspeed

    zero, recipe = Zero(int(then)), Recipe(MAKE)
    engine, *_ = deepspeed.initialize(
        model=session.module, optimizer=MAKE(session.module.parameters()), config=zero.configuration(SHAPE, recipe)
    )
    other = Session(SHAPE, session.module, None, zero.topology, engine=engine, replica=dist.get_rank()).train(2, 4)
    return all(torch.allclose(w, twin.get_parameter(name), atol=1e-5) for name, w in other.weights().items())


@needs_deepspeed
@pytest.mark.parametrize(
    ("first", "then"), beside([("zero1", "plain")], [("zero2", "0"), ("zero0", "1"), ("zero2", "1")])
)
def test_an_engine_is_destroyed_and_the_model_goes_on(first: str, then: str) -> None:
    assert all(run(_destroyed, 2, first, then))


def _started_later() -> tuple[Weights, Weights]:
    """Weights of a model under DDP, in the middle of whose training DeepSpeed is started for another one."""
    session, twin = (data_parallel(SHAPE, MAKE, dtype=torch.float32).train(0, 2) for _ in range(2))
    expected = copy.deepcopy(twin.train(2, 4).weights())
    prepare_deepspeed()
    with_zero(SHAPE, Zero(1), Recipe(MAKE)).train(0, 2)
    return session.train(2, 4).weights(), expected


@needs_deepspeed
def test_deepspeed_may_be_started_later_for_another_model() -> None:
    for found, expected in run(_started_later, 2):
        assert not _differing(found, expected)


def _universal() -> str:
    session = _session("zero3")
    for tensor in session.engine.optimizer.fp32_partitioned_groups_flat:
        session.optimizer.state[tensor] |= {"step": torch.tensor(3.0), "exp_avg": torch.zeros_like(tensor)}
    try:
        session.train(0, 1)
    except StepRefusedError as error:
        return str(error)
    return ""


@needs_deepspeed
def test_state_that_an_engine_has_put_there_itself_is_refused() -> None:
    for message in run(_universal, 2):
        assert "as DeepSpeed does with a universal checkpoint, which has no factors of 3D-Shampoo" in message


def _sharded_late() -> tuple[Weights, Weights]:
    """Weights of a model that was sharded before the optimizer was made, and of one that was sharded after it."""
    found = []
    for late in (False, True):
        session = one_process(SHAPE, MAKE)
        module = session.module.float()
        optimizer = MAKE(module.parameters()) if late else None
        fully_shard(module)
        session = Session(SHAPE, module, optimizer or MAKE(module.parameters()))
        found.append(session.train(0, 3).weights())
    return found[0], found[1]


def test_the_model_may_be_sharded_after_the_optimizer_was_made() -> None:
    for early, late in run(_sharded_late, 2):
        assert not _differing(late, early)
