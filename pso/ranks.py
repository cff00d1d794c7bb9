"""One run in several processes: which rows are this one's, and what all of them have together.

Every process knows the whole batch: which samples, which noise. Each puts its share of the rows through the network, on
a GPU of its own; the numbers that come out ([B, S] evidence, rewards, sampled latents) are made whole again in every
process, and gradients are added up. So a loss sees the whole batch, whatever it does with it, and neither the samples
nor their noise depend on how many processes there are: results agree to the rounding of float32.
"""

import contextlib
from collections.abc import Iterable, Iterator

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor


class Ranks:
    """The processes of a run; without an accelerator this one alone."""

    def __init__(self, accelerator: Accelerator | None = None):
        self.accelerator = accelerator
        self.count = 1 if accelerator is None else accelerator.num_processes
        self.index = 0 if accelerator is None else accelerator.process_index

    @property
    def main(self) -> bool:
        """Whether this process writes the files."""
        return self.index == 0

    def lengths(self, rows: int) -> list[int]:
        """How many of some rows each process has: as equal as can be, the first ones one more."""
        each, more = divmod(rows, self.count)
        return [each + (k < more) for k in range(self.count)]

    def share(self, rows: int) -> slice:
        """This process's rows."""
        lengths = self.lengths(rows)
        start = sum(lengths[: self.index])
        return slice(start, start + lengths[self.index])

    def whole(self, own: Tensor, rows: int) -> Tensor:
        """All rows [rows, ...] of what each process has its share of, in order, on the same device."""
        if self.count == 1:
            return own
        lengths = self.lengths(rows)
        padded = torch.zeros((lengths[0], *own.shape[1:]), dtype=own.dtype, device=self.accelerator.device)
        padded[: len(own)] = own
        parts = self.accelerator.gather(padded).split(lengths[0])
        return torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)]).to(own.device)

    def lists(self, own: list) -> list:
        """The entries of all processes' lists, in order. For tensors of other lengths than a share; give them on the
        CPU."""
        return own if self.count == 1 else gather_object(own)

    def add_up_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """The sum over the processes, in one message; where a process has no gradient, it adds nothing."""
        if self.count == 1:
            return
        parameters = list(parameters)
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        sums = self.accelerator.reduce(torch.cat([grad.flatten() for grad in grads]), "sum")
        for parameter, total in zip(parameters, sums.split([grad.numel() for grad in grads]), strict=True):
            parameter.grad = total.view_as(parameter).clone()

    def total(self, number: int) -> int:
        """The sum of a count over the processes."""
        if self.count == 1:
            return number
        return int(self.accelerator.reduce(torch.tensor(number, device=self.accelerator.device), "sum").item())

    def any(self, own: bool) -> bool:
        """Whether it is true of any process."""
        return bool(own) if self.count == 1 else self.total(int(own)) > 0

    def wait(self) -> None:
        """Until all processes are here."""
        if self.accelerator is not None:
            self.accelerator.wait_for_everyone()

    def end(self) -> None:
        """The processes part, all of them at once: a launcher ends the others when one ends badly before them."""
        if self.accelerator is not None:
            self.accelerator.wait_for_everyone()
            self.accelerator.end_training()

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Memory that runs out in one process runs out in all: none waits for numbers of one that gave up."""
        lack = None
        try:
            yield
        except torch.OutOfMemoryError as error:
            lack = error
        if self.any(lack is not None):
            raise lack or torch.OutOfMemoryError("in another process")
