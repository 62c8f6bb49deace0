"""Parts of a page that are made from records: they stand between `<!-- NAME -->` or `<!-- NAME: ARGUMENT -->` and `<!-- end -->`."""

import re
from collections.abc import Callable, Mapping


def filled(text: str, made: Mapping[str, Callable[[str], str]]) -> str:
    """The page with these parts made anew.

    Args:
        made: NAME -> what makes such a part from its ARGUMENT, "" where it has none.
    """
    return re.sub(
        rf"(<!-- ({'|'.join(made)})(?:: (\S+))? -->\n).*?(?=<!-- end -->)",
        lambda found: f"{found[1]}\n{made[found[2]](found[3] or '')}\n\n",
        text,
        flags=re.DOTALL,
    )
