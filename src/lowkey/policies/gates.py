"""What a policy has learnt of one model: gates, or statistics of its queries. A folder holds it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowkey.core import files
from lowkey.core.errors import LowkeyError

if TYPE_CHECKING:
    from torch import Tensor

GATES_FORMAT, GATES_KIND = 1, "gates"
GATES_JSON, GATES_TENSORS = "gates.json", "gates.safetensors"
# Types of the fields of gates.json, without the tensors.
FIELDS = {"method": str, "layers": int, "model": str, "model_sha256": str, "settings": dict}


@dataclass(frozen=True, eq=False)
class Gates:
    """What a policy has learnt of one model.

    Args:
        method: name of the policy, a key of SCORES.
        layers: for each layer that evicts, its tensors by name, in fp32.
        model: name of the model.
        model_sha256: fingerprint of its weights.
        settings: how they were learnt, as plain JSON.
    """

    method: str
    layers: tuple[dict[str, Tensor], ...]
    model: str
    model_sha256: str
    settings: dict

    def describe(self) -> dict[str, Any]:
        """All fields but the tensors, as JSON has them."""
        return {name: getattr(self, name) for name in FIELDS} | {"layers": len(self.layers)}

    def save(self, path: str | Path, force: bool = False) -> str:
        """Write a folder, in one step.

        Args:
            path: the folder.
            force: whether to replace another folder that lowkey wrote.

        Returns:
            The checksum of what was written.

        Raises:
            LowkeyError: if it cannot be written.
        """
        place = Path(path)
        files.check_folder(place, force, again=GATES_JSON)
        with files.replacing_folder(place) as temporary:
            tensors = {f"{i}.{name}": t for i, own in enumerate(self.layers) for name, t in own.items()}
            checksum = files.write_tensors(temporary / GATES_TENSORS, tensors, GATES_KIND)
            about = {"format": GATES_FORMAT, **self.describe(), "tensors_sha256": checksum}
            return files.write_json(temporary / GATES_JSON, about, GATES_KIND)

    @classmethod
    def load(cls, path: str | Path) -> Gates:
        """Read a folder that `save` wrote.

        Raises:
            LowkeyError: no such folder, a newer format, or damage.
        """
        place = Path(path)
        return files.read_consistently(place, lambda: cls._read(place))

    @classmethod
    def _read(cls, path: Path) -> Gates:
        source = "run `lowkey gates MODEL OUT`"
        about = files.read_json(path / GATES_JSON, "gates", GATES_KIND, GATES_FORMAT, source=source)
        typed = all(type(about.get(name)) is kind for name, kind in FIELDS.items())
        if not typed or type(about.get("tensors_sha256")) is not str:
            raise damaged_gates(path, "gates.json lacks or garbles a field")
        tensors = files.read_tensors(path / GATES_TENSORS, "gates", GATES_KIND, about["tensors_sha256"])
        layers: tuple[dict[str, Tensor], ...] = tuple({} for _ in range(min(about["layers"], len(tensors))))
        for whole, t in tensors.items():
            index, _, name = whole.partition(".")
            if not (index.isdecimal() and str(int(index)) == index and int(index) < len(layers) and name):
                raise damaged_gates(path, f"they hold {whole!r:.60}, which is of no layer")
            layers[int(index)][name] = t
        if len(layers) != about["layers"]:
            raise damaged_gates(path, f"they lack layers: {about['layers']} are stated")
        return cls(layers=layers, **{name: about[name] for name in FIELDS if name != "layers"})

    def check_shapes(self, shapes: dict[str, tuple[int, ...]], count: int) -> None:
        """Check that every layer has the tensors that its policy reads.

        Args:
            shapes: of the tensors of one layer, by name.
            count: how many layers evict.

        Raises:
            LowkeyError: if one is missing, of another shape, or too many.
        """
        found = [{name: tuple(t.shape) for name, t in own.items()} for own in self.layers]
        if found != [shapes] * count:
            wrong = next((i for i, own in enumerate(found) if own != shapes), len(found))
            raise LowkeyError(
                f"gates of {self.method}: layer {wrong} of {count} does not hold "
                f"{', '.join(f'{name} {shape}' for name, shape in shapes.items())}; they are damaged: "
                "make them again with `lowkey gates`"
            )


def damaged_gates(path: Path, rule: str) -> LowkeyError:
    """The error for a folder of gates that breaks a rule."""
    return LowkeyError(f"gates {str(path)!r}: {rule}; they are damaged or not ours: make them again")
