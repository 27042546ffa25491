"""`AutoModelForVision2Seq`: transformers 4.57's own class, and on 5.x, which dropped it, a stand-in for the name."""

from .compat_v4 import IS_TRANSFORMERS_4


if IS_TRANSFORMERS_4:
    from transformers import AutoModelForVision2Seq  # type: ignore[attr-defined]
else:
    from transformers import AutoModelForImageTextToText

    class AutoModelForVision2Seq:  # type: ignore[no-redef]
        """Delegates to `AutoModelForImageTextToText`, the name of the same task since transformers 5."""

        def __init__(self):
            raise OSError("Use AutoModelForVision2Seq.from_pretrained(...) or .from_config(...).")

        # delegation, not a subclass: a subclass of an Auto class fails on its first remote-code load
        @classmethod
        def from_pretrained(cls, *args, **kwargs):
            """See `AutoModelForImageTextToText.from_pretrained`."""
            return AutoModelForImageTextToText.from_pretrained(*args, **kwargs)

        @classmethod
        def from_config(cls, *args, **kwargs):
            """See `AutoModelForImageTextToText.from_config`."""
            return AutoModelForImageTextToText.from_config(*args, **kwargs)


__all__ = ["AutoModelForVision2Seq"]
