"""What the options of all groups say, in columns with one entry a group: checked and read once, and kept while none has changed."""

from operator import attrgetter, is_, itemgetter
from types import NoneType
from typing import TYPE_CHECKING, Any

from .. import schedule
from ..patterns import NM, TopK
from .options import check_groups, check_optimizer_options

if TYPE_CHECKING:
    from .cram import CrAM

EACH_STEP = ("params", "param_names", "lr", *schedule.COUNTERS)  # in a group, and read anew in each step
attributes = attrgetter("compression", "normalize_grad", "max_grad_norm", "master_weights", "mask_period", "grad_norms")


class Settings:
    """The options of an optimizer and of its groups.

    Attributes:
        plus, sparse, prune, rhos: of each group, the option of that name; `rhos` is None where one is a schedule.
        choices: the patterns among which each group draws; None where one has a schedule.
        numbers: see `Update.options`, which fills it.

    Raises:
        ValueError, RuntimeError: see `check_groups`.
    """

    def __init__(self, optimizer: "CrAM") -> None:
        check_optimizer_options(optimizer)
        check_groups(optimizer.base_optimizer)
        groups, self.attributes = optimizer.param_groups, attributes(optimizer)
        self.plus, self.sparse, self.prune, rhos, own = (
            [group[key] for group in groups] for key in ("plus", "sparse_grad", "prune", "rho", "compression")
        )
        self.rhos = None if any(map(callable, rhos)) else rhos
        scheduled = any(map(callable, (optimizer.compression, *own)))
        self.choices = None if scheduled else schedule.choices(groups, optimizer.compression)
        self.numbers: tuple[dict[str, list[Any]], dict[str, list[Any]]] | None = None
        keys = [[key for key in group if key not in EACH_STEP] for group in groups]
        readers = [itemgetter(*own) for own in keys]
        self.kept = [(read, read(group), len(group)) for read, group in zip(readers, groups, strict=True)]
        self.last = all(map(_lasts, (self.attributes, *[values for _, values, _ in self.kept])))

    def hold(self, optimizer: "CrAM") -> bool:
        """Whether none of them has changed."""
        groups = optimizer.param_groups
        if not self.last or len(groups) != len(self.kept) or not all(map(is_, self.attributes, attributes(optimizer))):
            return False
        try:
            for group, (read, values, size) in zip(groups, self.kept, strict=True):
                if len(group) != size or not all(map(is_, read(group), values)) or group["cram_step"] != groups[0]["cram_step"]:
                    return False
                if "param_names" in group and len(group["param_names"]) != len(group["params"]):
                    return False
        except KeyError:
            return False
        return True


def _lasts(value: Any) -> bool:
    """Whether it says tomorrow what it says today; of a list or a tensor nobody knows. A schedule is asked in each step."""
    if type(value) is tuple:
        return all(map(_lasts, value))
    return type(value) in (NoneType, bool, int, float, str, TopK, NM) or schedule.is_function(value)
