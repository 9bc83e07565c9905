"""One family: built, asked by itself, asked through the toolkit, judged."""

import copy
import re
import shutil
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sweep import facts, right, tiny
from sweep.oracle import Seen, rounds, runs
from sweep.prompts import SHOTS
from sweep.right import Group, Numbers

ROUNDED = "float64, in places float32"
TOLERANCE = {"float32": 1e-3, ROUNDED: 1e-4, "float64": 1e-5}
"""How far a number may be off, relative as `off` says; those of `SLOPED` in float32 ten times as far. In places float32: a
family's norms or rotations, whatever its weights are in; the last bit of float64 decides which way they round."""
SLOPED = ("maps", "sums", "re-weighting", "patching")
"""In float64 where the untouched model runs in it: numbers that rest on gradients, and patching, whose small differences a
router of experts, a step function, may turn into large ones by rounding."""


@dataclass(frozen=True)
class Row:
    """What came of one number in one family.

    Attributes:
        family: or variant.
        kind: causal, or image-text.
        number: which.
        verdict: exact, refused, wrong, crash; unjudged where there is no right value; not tried.
        error: the largest, see `off`.
        precision: in which both sides were computed.
        reason: what the toolkit said, or where it is wrong.
        shown: what the untouched model shows that is a cause to refuse this number.
    """

    family: str
    kind: str
    number: str
    verdict: str
    error: float | None = None
    precision: str = ""
    reason: str = ""
    shown: str = ""


def off(number: str, got: Tensor, wanted: Tensor, scale: float = 1.0) -> float:
    """How far one tensor is from another.

    Logits and maps: ‖got − wanted‖ / ‖wanted‖, by row of the first dimension (rows below a thousandth of the whole count
    as a thousandth). The three sums, attention and β: relative to the largest entry. Probabilities and losses: absolute.
    Patching: numerators relative to ‖z_B − z_A‖² (`_size`), shifts of probabilities absolute.
    """
    if got.shape != wanted.shape:
        return float("inf")
    got, wanted = got.double(), wanted.double()
    if not torch.isfinite(got).all():
        return float("inf")
    if number in ("logits", "padded", "maps"):
        got, wanted = (x[None] if x.dim() == 1 else x for x in (got, wanted))
        rows = got.reshape(len(got), -1) - wanted.reshape(len(got), -1)
        sizes = wanted.reshape(len(got), -1).norm(dim=1)
        return float((rows.norm(dim=1) / sizes.clamp(min=1e-3 * float(wanted.norm()) + 1e-300)).max())
    if number == "sums":
        sizes = wanted.abs().amax(1, keepdim=True).clamp(min=1e-300)
        return float(((got - wanted).abs() / sizes).max())
    if number == "readout":
        return float((got - wanted).abs().max() / wanted.abs().max())
    return float((got - wanted).abs().max()) / scale


def said(error: BaseException) -> str:
    """In one line, without the folder that the tiny models lie in."""
    return re.sub(r"\S*/models/", "…/", re.sub(r"\s+", " ", str(error))).strip()[:400]


def place(error: BaseException) -> str:
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {said(error)[:300]} ({Path(last.filename).name}:{last.lineno})"


class Untouched:
    """A family's own model, fresh, and what is right."""

    def __init__(self, model: nn.Module, groups: Sequence[Group]) -> None:
        self.model, self.groups = model.eval().requires_grad_(True), groups
        self.ends = {"short": groups[0].prompts[0], "long": groups[-1].prompts[0]}
        self.slopes: dict[str, Tensor] = {}

    def runs(self) -> tuple[Tensor, Seen]:
        with torch.no_grad():
            return runs(self.model, self.ends["short"].ids)

    def right(self, number: str) -> Numbers:
        return {name: x.detach() for name, x in getattr(self, "_" + number.replace("-", ""))().items()}

    def all_right(self, numbers: Sequence[str], strict: bool = True) -> dict[str, Any]:
        """Right values of some numbers; `strict` raises where there is none."""
        compute = self.right if strict else lambda number: attempt(lambda: self.right(number))
        return {number: compute(number) for number in numbers}

    def _logits(self) -> Numbers:
        return {name: right.logits(self.model, p) for name, p in self.ends.items()}

    def _padded(self) -> Numbers:
        return {name: right.logits(self.model, p)[-1] for name, p in self.ends.items()}

    def _maps(self) -> Numbers:
        self.slopes = {name: right.maps(self.model, p) for name, p in self.ends.items()}
        return self.slopes

    def _sums(self) -> Numbers:
        own = {
            name: right.sums(flow, self.ends[name]) for name, flow in (self.slopes or self._maps()).items()
        }
        return {"short/alone": own["short"], "short/batch": own["short"], "long/batch": own["long"]}

    def _each(self, compute: Callable[[Group], Numbers | Tensor]) -> Numbers:
        found: Numbers = {}
        for shots, group in zip(SHOTS, self.groups, strict=True):
            own = compute(group)
            found |= (
                {str(shots): own}
                if isinstance(own, Tensor)
                else {f"{shots}/{name}": x for name, x in own.items()}
            )
        return found

    def _shared(self) -> Numbers:
        return self._each(lambda group: right.answers(self.model, group.prompts))

    def _isolation(self) -> Numbers:
        with torch.no_grad():
            at, layers = right.places(self.model, self.ends["short"])
        count = max(right.ISOLATED, at[0] + 1, layers - at[-1])
        sides = {
            "first": [call for call, layer in enumerate(at) if layer < count],
            "last": [call for call, layer in enumerate(at) if layer >= layers - count],
        }
        return self._each(
            lambda group: {
                side: right.isolated(self.model, group.prompts, own) for side, own in sides.items()
            }
        )

    def _readout(self) -> Numbers:
        return self._each(lambda group: right.readout(self.model, group.prompts))

    def _reweighting(self) -> Numbers:
        found = self._each(lambda group: right.fitted(self.model, group))
        return {name: x.sort().values if name.endswith("beta") else x for name, x in found.items()}

    def _compression(self) -> Numbers:
        with torch.no_grad():
            heard = facts.hears_positions(self.model, self.ends["short"])
            first = facts.first_position(self.model, self.ends["short"]) if heard else None

        def compute(group: Group) -> Numbers:
            own = {rule: [attempt(lambda p=p, r=rule: right.compressed(self.model, p, r, first)) for p in group.prompts] for rule in right.RULES}  # fmt: skip
            if isinstance(error := own["original"][0], Exception):
                raise error
            return {
                rule: torch.stack(rows)
                for rule, rows in own.items()
                if not any(isinstance(x, Exception) for x in rows)
            }

        return self._each(compute)

    def _patching(self) -> Numbers:
        names = right.blocks(self.model, self.ends["short"])
        chosen = [names[0], names[len(names) // 2]]
        found = self._each(lambda g: right.patched(self.model, g.prompts[0], g.exchanged[0], chosen))
        return {name: x for name, x in found.items() if "stream" not in name}


def _loaded(name: str, folder: Path, size: int, edge: int) -> tuple[nn.Module, Any]:
    """The untouched model, and what the toolkit is to load: a folder, or the model where transformers itself cannot read
    back what it wrote."""
    from transformers import AutoModelForCausalLM

    built = tiny.build(name, size, edge)
    home = folder / "models" / name
    try:
        built.save_pretrained(home)
        for file in folder.glob("tokenizer*"):
            shutil.copy(file, home)
        model, report = AutoModelForCausalLM.from_pretrained(
            home, attn_implementation="eager", dtype=torch.float32, output_loading_info=True
        )
        if type(model) is type(built) and not report["missing_keys"] and not report["mismatched_keys"]:
            model.load_state_dict(
                built.state_dict()
            )  # what the file holds; loading zeroes Youtu's padding row
            return model, home
    except Exception:  # noqa: BLE001, S110 - whatever transformers raises on its own files
        pass
    shutil.rmtree(home, ignore_errors=True)
    return built, None


def sweep(
    name: str,
    folder: Path,
    size: int,
    edge: int,
    groups: Sequence[Group],
    numbers: Sequence[str] = facts.EVERY,
    evidence: bool = True,
) -> list[Row]:
    """Some numbers of a causal family. The toolkit is imported after everything that is right is known.

    Args:
        folder: with the tokenizer; the model is saved there.
        size, edge, groups: of `sweep.prompts.read`.
        evidence: whether to look for causes of refusals.
    """
    if name in tiny.NOT_TRIED:
        return [Row(name, "causal", "all", "not tried", reason=tiny.NOT_TRIED[name])]
    try:
        model, home = _loaded(name, folder, size, edge)
        spare = None if home else copy.deepcopy(model)
        untouched = Untouched(model, groups)
        if not torch.isfinite(untouched.runs()[0]).all():
            raise ValueError("logits that are not finite")
    except Exception as error:  # noqa: BLE001 - said in the table
        return [Row(name, "causal", "all", "not tried", reason=place(error))]
    against = facts.facts(model, groups) if evidence else []
    plain = [number for number in numbers if number not in SLOPED]
    sloped = [number for number in numbers if number in SLOPED]
    single = {number: attempt(lambda n=number: untouched.right(n)) for number in plain}
    exact = "float64"

    def in_double() -> dict[str, Any]:
        nonlocal exact
        twin = Untouched(copy.deepcopy(model).double(), groups)
        exact = ROUNDED if rounds(twin.model, groups[0].prompts[0].ids) else exact
        return twin.all_right(sloped)

    double = attempt(in_double) if sloped else {}
    if isinstance(double, Exception):
        double = None
    slow = untouched.all_right(sloped, strict=False) if double is None else {}

    def toolkit(precision: str) -> Any:
        from sweep.ours import Toolkit

        return Toolkit(home or copy.deepcopy(spare), folder, precision)

    # Whether a family is taken at all is decided in float32, in which the toolkit is used.
    lm = attempt(lambda: toolkit("float32"))
    wide, precision, right_sloped = lm, "float32", slow
    if sloped and double is not None:
        wide, precision, right_sloped = (
            (lm if isinstance(lm, Exception) else attempt(lambda: toolkit("float64"))),
            exact,
            double,
        )
        if isinstance(wide, Exception) and not isinstance(lm, Exception):
            wide, precision, right_sloped = lm, "float32", untouched.all_right(sloped, strict=False)
    rows = [judged(name, "certificate", {}, lm, "float32", against)]
    for number in numbers:
        own, wanted, how = (
            (wide, right_sloped[number], precision) if number in SLOPED else (lm, single[number], "float32")
        )
        row = judged(name, number, wanted, own, how, against)
        if row.verdict == "wrong" and number not in SLOPED:
            # A choice of keys turns on the last bit of float32; in float64 both sides make the same one.
            twin = Untouched(copy.deepcopy(model).double(), groups)
            right_wide, own_wide = (
                attempt(lambda n=number, t=twin: t.right(n)),
                attempt(lambda: toolkit("float64")),
            )
            if not isinstance(right_wide, Exception):
                row = judged(name, number, right_wide, own_wide, "float64", against)
        rows.append(row)
    return rows


def attempt(function: Callable[[], Any]) -> Any:
    """What a function returns, or the exception that it raised."""
    try:
        return function()
    except Exception as error:  # noqa: BLE001 - judged by the caller
        return error


def judged(
    family: str,
    number: str,
    wanted: Numbers | Exception,
    toolkit: Any,
    precision: str,
    against: Sequence[facts.Fact],
) -> Row:
    """The verdict on one number."""
    from anchors.errors import AnchorsError

    own = toolkit if isinstance(toolkit, Exception) else attempt(lambda: toolkit.numbers()[number]())
    shown = "; ".join(fact.text for fact in against if number in fact.numbers or number == "certificate")
    about = {"family": family, "kind": "causal", "number": number, "precision": precision, "shown": shown}
    if isinstance(own, AnchorsError):
        return Row(verdict="refused", reason=said(own), **about)
    if isinstance(own, Exception):
        return Row(verdict="crash", reason=place(own), **about)
    if isinstance(wanted, Exception):
        return Row(verdict="unjudged", reason=f"no right value: {place(wanted)}", **about)
    error, where = worst(number, own, wanted)
    allowed = TOLERANCE[precision] * (10 if number in SLOPED and precision == "float32" else 1)
    verdict = "exact" if error <= allowed else "wrong"
    return Row(verdict=verdict, error=error, reason=where if verdict == "wrong" else "", **about)


def worst(number: str, got: Numbers, wanted: Numbers) -> tuple[float, str]:
    """The largest error, and where. A number without a right value of its own counts as wrong."""
    errors = {
        name: off(
            number, x, wanted[name], _size(wanted[f"{name[0]}/denominator"]) if "numerator" in name else 1.0
        )
        if name in wanted
        else float("inf")
        for name, x in got.items()
    }
    if missing := set(wanted) - set(got):
        return float("inf"), f"{sorted(missing)} missing"
    if not errors:
        return 0.0, ""
    name = max(errors, key=errors.__getitem__)
    return errors[name], name if name in wanted else f"{name}, of which there is no right value here"


def _size(denominator: Tensor) -> float:
    """Of a numerator: ‖z_B − z_A‖², but no less than ‖z_B − z_A‖ times a logit of size 1, since logits are rounded."""
    return float(max(denominator, denominator.sqrt()))


def as_record(row: Row) -> dict[str, Any]:
    return asdict(row)
