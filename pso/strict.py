"""What all entries have in common: unknown keys refused, no silent conversion, nothing changed afterwards."""

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]


def _whole(value: Any) -> Any:
    """JSON makes text of a mapping's keys, and Snakemake's command line of the numbers in a list."""
    return int(value) if isinstance(value, str) and value.isdecimal() else value


WholeNumber = Annotated[int, BeforeValidator(_whole)]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
