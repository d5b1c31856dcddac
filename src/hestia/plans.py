"""Plan: who gets quantized, how, and why the rest is kept. Read it before spending a GPU-hour."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from .errors import ConfigError, PlanError, nearest
from .files import read_json, write_json
from .quant.corrections import Correction
from .quant.spec import QuantSpec
from .schedules import KnobSchedule
from .targets import Stored, file_bytes, target

SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class LayerPlan:
    """One quantized weight matrix.

    Attributes:
        spec: its quantizer.
        shape: (out_features, in_features).
        temperature_factor: exp(alpha (s_i - c)); multiplies the base temperature.
        stored: storage type of each target, ``{"gguf:tq2_0": "TQ2_0"}``.
        damage: predicted KL of quantizing this tensor alone, nats per token; None where the plan did not ask.
    """

    spec: QuantSpec
    shape: tuple[int, int]
    temperature_factor: float = 1.0
    stored: Mapping[str, str] = field(default_factory=dict)
    damage: float | None = None

    @property
    def weights(self) -> int:
        """Number of weights in the matrix."""
        return self.shape[0] * self.shape[1]


@dataclass(frozen=True, kw_only=True)
class Kept:
    """One parameter that stays as it is, and why."""

    reason: str
    weights: int


@dataclass(frozen=True, kw_only=True)
class Spending:
    """How a plan of several widths came about.

    Attributes:
        target: the file format whose bytes were counted.
        asked_bits: the budget in stored bits per weight; None where a bound on the damage was asked for.
        asked_kl: that bound; None where a budget was asked for.
        bits: stored bits per weight of all tensors that could be quantized, kept ones, scales and padding included.
        predicted_kl: sum of the tensors' damages, nats per token, plus pairwise terms where they were given.
        source: where the damages come from, in words.
        left_out: width -> why no tensor could have it.
        curve: (bits, predicted KL) of the optimum at other budgets, ascending.
    """

    target: str
    asked_bits: float | None
    asked_kl: float | None
    bits: float
    predicted_kl: float
    source: str
    left_out: Mapping[str, str] = field(default_factory=dict)
    curve: tuple[tuple[float, float], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The JSON object ``spending`` of plan.json."""
        return {**vars(self), "left_out": dict(self.left_out), "curve": [list(point) for point in self.curve]}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Spending:
        """The inverse of ``to_json``; KeyError, TypeError or ValueError for a record that is none."""
        asked = {k: None if record[k] is None else float(record[k]) for k in ("asked_bits", "asked_kl")}
        return cls(
            target=target(record["target"]).name,
            source=str(record["source"]),
            left_out={str(k): str(v) for k, v in record["left_out"].items()},
            curve=tuple((float(bits), float(damage)) for bits, damage in record["curve"]),
            bits=float(record["bits"]),
            predicted_kl=float(record["predicted_kl"]),
            asked_bits=asked["asked_bits"],
            asked_kl=asked["asked_kl"],
        )

    def summary(self) -> str:
        """One sentence: what was asked and what came out."""
        wanted = f"a predicted KL of {self.asked_kl:g}" if self.asked_kl is not None else f"{self.asked_bits:g} bits"
        return (
            f"asked for at most {wanted}: {self.bits:.4f} bits per weight in {self.target}, "
            f"linear layers it keeps included; predicted KL {self.predicted_kl:.4g} nats per token, from {self.source}"
        )


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Module path -> LayerPlan, parameter name -> Kept, and the schedule that moves the knobs.

    Attributes:
        recipe: name and options of the recipe that made it, ``{"name": "hestia", "alpha": 0.4}``.
        trains: False for recipes that only round.
        targets: the file formats it was checked against.
        schedule: pressure and temperature over training.
        layers: the quantized weights, in the order of the model.
        kept: every other parameter, in the order of the model.
        warnings: sentences about large weights that hestia cannot quantize; shown with the table.
        correction: what pulls the latent weights after every optimizer step, or nothing.
        spending: how the bits were allocated; None where all tensors have one width.
        itemsize: bytes of a number in the parent's dtype, in which files hold kept weights and some of them scales.
    """

    recipe: Mapping[str, Any]
    trains: bool
    targets: tuple[str, ...]
    schedule: KnobSchedule
    layers: Mapping[str, LayerPlan]
    kept: Mapping[str, Kept]
    warnings: tuple[str, ...] = ()
    correction: Correction | None = None
    spending: Spending | None = None
    itemsize: int = 2

    @property
    def quantized_weights(self) -> int:
        """Number of weights that become low-bit."""
        return sum(layer.weights for layer in self.layers.values())

    @property
    def kept_weights(self) -> int:
        """Number of parameters that stay."""
        return sum(kept.weights for kept in self.kept.values())

    def bits_per_weight(self, target_name: str) -> float:
        """Stored bits per quantized weight in ``target_name``, scales and padding included."""
        return 8.0 * sum(self.stored_bytes(target_name).values()) / max(1, self.quantized_weights)

    def stored_bytes(self, target_name: str) -> dict[str, int]:
        """Module path -> bytes of every quantized weight in ``target_name``, scales and padding included."""
        return stored_bytes(self.layers, target_name, self.itemsize)

    def falls_back(self, target_name: str) -> bool:
        """Whether single tensors use another exact type of ``target_name`` than its own."""
        kind = target(target_name)
        own = kind.types[0].name
        return not kind.cheapest and any(layer.stored[target_name] != own for layer in self.layers.values())

    def save(self, path: str | Path) -> None:
        """Write plan.json atomically."""
        write_json(Path(path), self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read plan.json.

        Raises:
            ConfigError: not a plan, or one of another schema.
            PlanError: a plan with a bad value; the layer is named.
        """
        return cls.from_json(read_json(Path(path), schema=SCHEMA), where=str(path))

    def to_json(self) -> dict[str, Any]:
        """The JSON object of plan.json."""
        record = {
            "schema": SCHEMA,
            "recipe": dict(self.recipe),
            "trains": self.trains,
            "targets": list(self.targets),
            "schedule": self.schedule.to_json(),
            "layers": {
                path: {
                    "shape": list(layer.shape),
                    "temperature_factor": layer.temperature_factor,
                    "stored": dict(layer.stored),
                    **({} if layer.damage is None else {"damage": layer.damage}),
                    **layer.spec.to_json(),
                }
                for path, layer in self.layers.items()
            },
            "kept": {name: {"reason": kept.reason, "weights": kept.weights} for name, kept in self.kept.items()},
            "warnings": list(self.warnings),
            "itemsize": self.itemsize,
            **({} if self.spending is None else {"spending": self.spending.to_json()}),
        }
        return record if self.correction is None else {**record, "correction": self.correction.to_json()}

    @classmethod
    def from_json(cls, record: dict[str, Any], where: str = "plan") -> Plan:
        """The inverse of ``to_json``.

        Raises:
            PlanError: a missing or bad value, or a storage type that cannot hold its tensor; the place is named.
        """
        place = where
        try:
            targets = tuple(target(name).name for name in record["targets"])
            if not targets or not isinstance(record["recipe"]["name"], str):
                raise PlanError("a plan names its recipe and at least one target")
            layers: dict[str, LayerPlan] = {}
            for path, entry in record["layers"].items():
                place = f"{where}: {path}"
                rows, columns = (int(n) for n in entry["shape"])
                factor = float(entry["temperature_factor"])
                if not 0.0 < factor < 1e6:
                    raise PlanError(f"temperature_factor must be positive and finite, got {factor}")
                spec, shape, stored = QuantSpec.from_json(entry), (rows, columns), dict(entry["stored"])
                spec.check_shape(shape)
                for name in targets:
                    _check_stored(name, stored.get(name), spec, shape)
                damage = None if entry.get("damage") is None else float(entry["damage"])
                layers[path] = LayerPlan(
                    spec=spec, shape=shape, temperature_factor=factor, stored=stored, damage=damage
                )
            place = where
            if not layers:
                raise PlanError("a plan quantizes at least one tensor, this one names none")
            itemsize = int(record.get("itemsize", 2))
            if itemsize < 1:
                raise PlanError(f"itemsize must be the bytes of a number, such as 2 for bf16, got {itemsize}")
            return cls(
                recipe=dict(record["recipe"]),
                trains=bool(record["trains"]),
                targets=targets,
                schedule=KnobSchedule(**record["schedule"]),
                layers=layers,
                kept={k: Kept(reason=str(v["reason"]), weights=int(v["weights"])) for k, v in record["kept"].items()},
                warnings=tuple(map(str, record["warnings"])),
                correction=Correction.from_json(record["correction"]) if "correction" in record else None,
                spending=None if record.get("spending") is None else Spending.from_json(record["spending"]),
                itemsize=itemsize,
            )
        except KeyError as error:
            raise PlanError(f"{place}: missing key {error}") from None
        except (ConfigError, TypeError, ValueError, AttributeError) as error:
            raise PlanError(f"{place}: {error}") from None

    def with_factors(self, factors: Mapping[str, float]) -> Plan:
        """The same plan with other temperature factors; tensors not named get 1."""
        layers = {p: replace(layer, temperature_factor=factors.get(p, 1.0)) for p, layer in self.layers.items()}
        return replace(self, layers=layers)

    def table(self) -> str:
        """The plan for people: one line a quantized tensor, then the kept ones by reason."""
        width = max((len(path) for path in self.layers), default=10)
        grid = max([8, *(len(layer.spec.grid.name) for layer in self.layers.values())])
        spent = f"{'bits':>7} {'damage':>9}  " if self.spending is not None else ""
        sizes = {} if self.spending is None else self.stored_bytes(self.spending.target)
        lines = [f"{'tensor':<{width}}  {'shape':>13}  {'grid':<{grid}} {'group':<7} {'tau x':>6}  {spent}stored as"]
        for path, layer in self.layers.items():
            shape = f"{layer.shape[0]} x {layer.shape[1]}"
            stored = ", ".join(dict.fromkeys(layer.stored.values())) or "-"
            lines.append(
                f"{path:<{width}}  {shape:>13}  {layer.spec.grid.name:<{grid}} {layer.spec.group_size!s:<7} "
                f"{layer.temperature_factor:>6.3f}  {_spent(layer, sizes.get(path))}{stored}"
            )
        reasons: dict[str, tuple[int, int]] = {}
        for kept in self.kept.values():
            count, weights = reasons.get(kept.reason, (0, 0))
            reasons[kept.reason] = (count + 1, weights + kept.weights)
        lines.append("")
        for reason, (count, weights) in reasons.items():
            lines.append(f"kept: {reason:<44} {count:>5} tensors {weights:>14,} weights")
        total = self.quantized_weights + self.kept_weights
        share = 100.0 * self.quantized_weights / max(1, total)
        lines.append(f"quantized: {self.quantized_weights:,} of {total:,} weights ({share:.1f} %)")
        for name in self.targets:
            lines.append(f"{name}: {self.bits_per_weight(name):.4f} bits per quantized weight, scales included")
        if self.spending is not None:
            lines += [f"{width} bits left out: {why}" for width, why in self.spending.left_out.items()]
            lines.append(self.spending.summary())
        lines += [f"WARNING: {warning}" for warning in self.warnings]
        return "\n".join(lines)


def stored_bytes(layers: Mapping[str, LayerPlan], target_name: str, itemsize: int) -> dict[str, int]:
    """Module path -> bytes of all ``layers`` in one file; ``itemsize``: see ``targets.file_bytes``."""
    types = {t.name: t for t in target(target_name).types}
    tensors: list[Stored] = [
        (types[layer.stored[target_name]], layer.spec.group_size, layer.shape) for layer in layers.values()
    ]
    return dict(zip(layers, file_bytes(tensors, itemsize), strict=True))


def _spent(layer: LayerPlan, stored: int | None) -> str:
    """Stored bits per weight and predicted damage of one tensor, where bits were allocated."""
    if stored is None:
        return ""
    damage = "-" if layer.damage is None else f"{layer.damage:.3g}"
    return f"{8.0 * stored / layer.weights:>7.4f} {damage:>9}  "


def _check_stored(target_name: str, type_name: str | None, spec: QuantSpec, shape: tuple[int, int]) -> None:
    """Refuse a storage type that the target lacks or that cannot hold the tensor: plan.json may have been edited."""
    types = {t.name: t for t in target(target_name).types}
    if type_name not in types:
        raise PlanError(f"stored: {target_name} has no type {type_name!r}: {nearest(str(type_name), types)}")
    refusal = types[type_name].refusal(spec.grid, spec.group_size, shape)
    if refusal is not None:
        raise PlanError(f"stored: {refusal}")
