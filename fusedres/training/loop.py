"""The training loop: steps, tests after every epoch, and a state that can be saved between any two steps."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from fusedres.models.resnet import Network
from fusedres.training.data import Data, Order, Testing
from fusedres.training.distributed import Processes
from fusedres.training.log import Epoch
from fusedres.training.recipe import Optimizer
from fusedres.training.recompute import recompute
from fusedres.training.run import Run
from fusedres.training.schedule import Schedule

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TEST_BATCHES = 2  # images in a test, by those in a step: nothing is kept for a backward
SYNC = 20  # iterations between two looks at the loss, for which a GPU has to be waited

# iteration, loss and learning rate
Watcher = Callable[[int, float, float], None]


@dataclasses.dataclass
class Progress:
    """How far a run has come.

    Args:
        epoch: that is under way, from 0.
        step: of it, that comes next.
        iteration: steps taken in all.
        images: of this epoch.
        epoch_seconds: of it, spent in training.
        seconds: of the run, tests included.
    """

    epoch: int = 0
    step: int = 0
    iteration: int = 0
    images: int = 0
    epoch_seconds: float = 0.0
    seconds: float = 0.0


def parameter_groups(model: nn.Module, of: Optimizer) -> list[dict[str, Any]]:
    """All parameters, or matrices and filters apart from vectors, which then don't decay."""
    vectors = [p for p in model.parameters() if p.dim() < 2]
    others = [p for p in model.parameters() if p.dim() >= 2]
    if of.decay_norms:
        return [{"params": list(model.parameters())}]
    return [{"params": others}, {"params": vectors, "weight_decay": 0.0}]


class Trainer:
    """One run in one process of several, or alone.

    Args:
        run: what to do.
        data: the images.
        device: where to.
        processes: this one and the others.
        watch: called every ``SYNC`` iterations.

    Raises:
        ValueError: the batch can't be shared out, or the training images don't fill one.
    """

    def __init__(
        self,
        run: Run,
        data: Data,
        device: torch.device,
        processes: Processes | None = None,
        watch: Watcher | None = None,
    ) -> None:
        self.run, self.data, self.device = run, data, device
        self.processes = processes or Processes()
        self.watch = watch
        recipe = run.recipe
        parts = self.processes.count * run.accumulate
        if recipe.batch % parts:
            raise ValueError(
                f"batch must be a multiple of {parts}, processes times accumulate, got {recipe.batch}"
            )
        self.steps = len(data.train) // recipe.batch
        if not self.steps:
            raise ValueError(
                f"batch must be at most the {len(data.train):,} training images, got {recipe.batch}"
            )
        self.length = recipe.length(self.steps)
        self.net = run.net(len(data.classes))
        torch.manual_seed(run.seed)
        model: Any = self.net.build()
        if run.sync_bn and self.processes.count > 1:
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
        self.model: Network = model.to(device, memory_format=torch.channels_last)
        self.averaged = None
        if recipe.ema is not None:
            average = get_ema_multi_avg_fn(recipe.ema)  # type: ignore[no-untyped-call]
            self.averaged = AveragedModel(self.model, multi_avg_fn=average, use_buffers=True)
        if run.recompute:
            recompute(self.model)
        self.optimizer = torch.optim.SGD(
            parameter_groups(self.model, recipe.optimizer),
            lr=recipe.optimizer.lr,
            momentum=recipe.optimizer.momentum,
            nesterov=recipe.optimizer.nesterov,
            weight_decay=recipe.optimizer.weight_decay,
        )
        self.schedule = Schedule(recipe.schedule, self.length)
        self.scaler = torch.amp.GradScaler(device.type, enabled=run.precision == "fp16")
        self.parallel = self.processes.wrap(self.model, device)
        self.progress = Progress()
        # of this epoch, in this process: the loss and what was classified wrong, summed over the images
        self.totals = torch.zeros(2, dtype=torch.float64, device=device)
        self.history: list[Epoch] = []

    @property
    def kept(self) -> nn.Module:
        """The net that is tested and kept: the average of the weights where the recipe has one."""
        return self.model if self.averaged is None else self.averaged.module

    @property
    def is_done(self) -> bool:
        return self.progress.iteration >= self.length

    def facts(self) -> dict[str, Any]:
        """What a trained net needs beside its weights."""
        return {
            "net": dataclasses.asdict(self.net),
            "classes": self.data.classes,
            "images": len(self.data.train),
            "normalisation": self.data.normalisation.state_dict(),
            "size": self.data.size,
            "resize": self.data.resize,
        }

    def state_dict(self) -> dict[str, Any]:
        """Everything that a run goes on from; to be asked for in every process.

        Raises:
            FloatingPointError: the loss or a weight is not finite.
        """
        totals = self.processes.total(self.totals.clone())
        self._check(float(totals[0]))
        if not all(p.isfinite().all() for p in self.model.parameters()):
            self._check(math.nan)
        return {
            **self.facts(),
            "run": self.run.state_dict(),
            "model": self.model.state_dict(),
            "averaged": None if self.averaged is None else self.averaged.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state_all() if self.device.type == "cuda" else [],
            "progress": dataclasses.asdict(self.progress),
            "totals": totals.cpu(),
            "history": [dataclasses.asdict(epoch) for epoch in self.history],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what ``state_dict`` gave.

        Raises:
            ValueError: the images are others than they were.
        """
        was = len(state["classes"]), state["images"]
        now = len(self.data.classes), len(self.data.train)
        if was != now or state["classes"] != self.data.classes:
            raise ValueError(
                f"the run began with {was[1]:,} training images of {was[0]} classes, "
                f"now {self.run.data} has {now[1]:,} of {now[0]}"
            )
        self.model.load_state_dict(state["model"])
        if self.averaged is not None:
            self.averaged.load_state_dict(state["averaged"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.scaler.load_state_dict(state["scaler"])
        torch.set_rng_state(state["random"])
        if self.device.type == "cuda" and state["random_cuda"]:
            torch.cuda.set_rng_state_all(state["random_cuda"])
        self.progress = Progress(**state["progress"])
        if self.processes.is_first:
            self.totals.copy_(state["totals"])
        self.history = [Epoch(**epoch) for epoch in state["history"]]

    def __iter__(self) -> Iterator[Epoch | None]:
        """Train to the end: an Epoch after the last step of an epoch or of the run, None after any other.

        Raises:
            FloatingPointError: the loss is not finite.
            DataError: an image can't be read.
        """
        progress, recipe = self.progress, self.run.recipe
        while progress.iteration < self.length:
            order = Order(
                len(self.data.train),
                recipe.batch,
                self.run.seed,
                progress.epoch,
                progress.step,
                self.processes.rank,
                self.processes.count,
            )
            last = min(self.steps, progress.step + self.length - progress.iteration)
            batches = itertools.islice(self.data.train.batches(order), last - progress.step)
            self.parallel.train()
            with self._bar() as bar:
                start = time.perf_counter()
                for images, labels in batches:
                    self._step(images, labels, bar)
                    now = time.perf_counter()
                    progress.epoch_seconds += now - start
                    progress.seconds += now - start
                    start = now
                    if progress.step < last:
                        yield None
                        start = time.perf_counter()
            yield self._end_of_epoch()

    def _bar(self) -> Any:
        return tqdm(
            total=self.steps,
            initial=self.progress.step,
            desc=f"epoch {self.progress.epoch + 1}/{math.ceil(self.length / self.steps)}",
            unit="img",
            unit_scale=self.run.recipe.batch,
            disable=None if self.processes.is_first else True,
            leave=False,
        )

    def _step(self, images: Tensor, labels: Tensor, bar: Any) -> None:
        progress, batch = self.progress, self.run.recipe.batch
        lr = self.run.recipe.optimizer.lr * self.schedule.factor
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        loss, wrong = self._gradients(images, labels)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.averaged is not None:
            self.averaged.update_parameters(self.model)
        self.totals += torch.stack([loss, wrong])
        watched = int(self.processes.total(wrong)) if self.schedule.watches_errors else 0
        self.schedule.after_iteration(watched, batch)
        progress.step += 1
        progress.iteration += 1
        progress.images += batch
        if progress.iteration % SYNC == 0:
            value = float(loss) / len(labels)
            self._check(value)
            bar.set_postfix(loss=f"{value:.3f}", refresh=False)
            if self.watch is not None:
                self.watch(progress.iteration, value, lr)
        bar.update()

    def _gradients(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The backward of one batch; the loss and what was classified wrong, summed over its images."""
        loss, wrong = self.totals.new_zeros(()), self.totals.new_zeros(())
        parts = list(zip(images.chunk(self.run.accumulate), labels.chunk(self.run.accumulate), strict=True))
        for index, (x, target) in enumerate(parts):
            more = index + 1 < len(parts) and isinstance(self.parallel, DistributedDataParallel)
            with self.parallel.no_sync() if more else contextlib.nullcontext():  # type: ignore[operator]
                with self._autocast():
                    logits = self.parallel(x)
                    own = F.cross_entropy(logits, target, label_smoothing=self.run.recipe.label_smoothing)
                self.scaler.scale(own * (len(target) / len(labels))).backward()  # type: ignore[no-untyped-call]
            loss += own.detach() * len(target)
            wrong += (logits.detach().argmax(1) != target).sum()
        return loss, wrong

    def _autocast(self) -> torch.autocast:
        dtype = DTYPES[self.run.precision]
        return torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32)

    def _check(self, loss: float) -> None:
        if not math.isfinite(loss):
            where = f"epoch {self.progress.epoch + 1}, iteration {self.progress.iteration:,}"
            raise FloatingPointError(f"the loss is no longer finite, in {where}")

    def _end_of_epoch(self) -> Epoch:
        progress, start = self.progress, time.perf_counter()
        lr = self.optimizer.param_groups[0]["lr"]
        loss, wrong = self.processes.total(self.totals).tolist()
        self._check(loss)
        held_out = self.data.validation
        validation_error = None if held_out is None else self.test(held_out)[1]
        test_loss, test_error = self.test(self.data.test)
        if progress.step == self.steps:
            self.schedule.after_epoch(test_error if validation_error is None else validation_error)
        progress.seconds += time.perf_counter() - start
        epoch = Epoch(
            number=progress.epoch + 1,
            iteration=progress.iteration,
            lr=lr,
            train_loss=loss / progress.images,
            train_error=wrong / progress.images,
            validation_error=validation_error,
            test_error=test_error,
            test_loss=test_loss,
            tested=len(self.data.test),
            images_per_second=progress.images / progress.epoch_seconds,
            seconds=progress.seconds,
        )
        self.history.append(epoch)
        progress.epoch += 1
        progress.step = progress.images = 0
        progress.epoch_seconds = 0.0
        self.totals.zero_()
        return epoch

    @torch.inference_mode()
    def test(self, images: Testing) -> tuple[float, float]:
        """The mean loss, and the share of the images that is classified wrong, by the net that is kept."""
        net = self.kept.eval()
        totals = torch.zeros_like(self.totals)
        size = TEST_BATCHES * self.run.recipe.batch // self.processes.count
        for x, labels in images.batches(size, self.processes.rank, self.processes.count):
            with self._autocast():
                logits = net(x).float()
            loss = F.cross_entropy(logits, labels, reduction="sum")
            totals += torch.stack([loss, (logits.argmax(1) != labels).sum()])
        loss, wrong = self.processes.total(totals).tolist()
        return loss / len(images), wrong / len(images)
