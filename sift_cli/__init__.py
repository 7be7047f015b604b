"""sift: sparse fine-tuning of pre-trained models."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sift_cli.delta import Delta

__all__ = ["Delta", "__version__"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """`Delta` brings torch with it, so it is imported when it is asked for."""
    if name == "Delta":
        from sift_cli.delta import Delta

        return Delta
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
