"""What a student's training minimises: alpha x teachers + beta x references + gamma x the teachers' encodings.

Each term is computed for the heads that learn, the CTC head's share being `ctc_weight` where both do. Weights and the
temperature may go from one value to another in a straight line over training. Utterances that have no target (their
teachers are missing) are learnt from the reference alone, those without a transcript from the teachers alone; every
term is a mean over the utterances that have it. Beside KL by frame stand posteriors over words, texts, and occupancies,
each with a weight of its own. Where all weights of teachers are 0 none is asked for anything: the hard-label run of the
same steps and seed is this same code.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import nn

from kdlib.decode.lexicon import Lexicon
from kdlib.models import Outputs
from kdlib.models.decoder import teacher_forced
from kdlib.models.encoder_cache import EncoderCache
from kdlib.models.encoder_conformer import length_mask
from kdlib.models.hybrid import Hybrid
from kdlib.objectives import losses
from kdlib.objectives.reference_losses import cross_entropies, cross_entropy, ctc_loss
from kdlib.settings import Distill
from kdlib.targets.aggregation import TeacherEnsemble
from kdlib.targets.pseudo_labels import TeacherHypotheses
from kdlib.tokens import BLANK, BOS, EOS


class Batch(NamedTuple):
    """What one step learns from."""

    wavs: torch.Tensor  # [B, N]
    wav_lens: torch.Tensor  # [B], samples
    ids: list[list[int]]  # of the references; empty where the transcript is not known
    utt_ids: list[str]
    speakers: list[str]


class TrainableStudent(nn.Module):
    """A student, and what it has while it learns: a projection of its encodings, a CTC head on a layer within it."""

    def __init__(self, student: Hybrid, features: int = 0, tap: int = 0) -> None:
        super().__init__()
        self.student = student
        self.project = nn.Linear(student.encoder.width, features) if features else None
        self.within = None
        if tap:
            student.encoder.return_layer(tap)
            self.within = nn.Linear(student.encoder.width, student.heads.size)


class Objective:
    """The loss of a batch, at a point of training between 0 and 1."""

    def __init__(
        self,
        learner: TrainableStudent,
        settings: Distill,
        targets: Mapping[str, TeacherEnsemble],
        hypotheses: TeacherHypotheses | None = None,
    ) -> None:
        self.learner, self.settings, self.targets = learner, settings, targets  # by output: "ctc", "decoder"
        self.hypotheses = hypotheses
        self.heads = {"both": ("ctc", "decoder")}.get(settings.heads, (settings.heads,))
        both = len(self.heads) == 2
        self.shares = {"ctc": settings.ctc_weight if both else 1.0, "decoder": 1 - settings.ctc_weight if both else 1.0}
        self._usable: dict[tuple[str, str], bool] = {}
        self.encoder_cache: EncoderCache | None = None  # what a frozen encoder says, where recordings stay as they are

    def __call__(self, batch: Batch, done: float = 0.0) -> dict[str, torch.Tensor]:
        """Named losses; "loss" is their weighted sum."""
        parts = self.parts(batch, done)
        total = sum(weight * value for weight, value in parts.values())
        return {"loss": total} | {name: value for name, (_, value) in parts.items()}

    def parts(self, batch: Batch, done: float = 0.0) -> dict[str, tuple[float, torch.Tensor]]:
        """Every loss with its weight."""
        settings = self.settings
        alpha, temperature = (
            anneal(settings.alpha, settings.alpha_end, done),
            anneal(settings.temperature, settings.temperature_end, done),
        )
        outputs = self.answer(batch)
        found: dict[str, tuple[float, torch.Tensor]] = {}
        told = [row for row, ids in enumerate(batch.ids) if ids]
        for head in self.heads:
            share = self.shares[head]
            if settings.beta and told:
                found[head] = settings.beta * share, self._hard(head, outputs, batch, told)
            rows = self._with_target(head, batch) if alpha or settings.pseudo_labels.weight else []
            if not rows:
                continue
            logits, target, plain, weights = self._soft(head, outputs, batch, rows, temperature)
            if alpha:
                temperature_on = {
                    "temperature_on": settings.temperature_on,
                    "fixed_temperature": self.targets[head].fixed_temperature,
                }
                found[f"kd_{head}"] = (
                    alpha * share,
                    losses.soft_kl(logits, target, weights, temperature, **temperature_on),
                )
            if settings.pseudo_labels.weight:
                known = settings.pseudo_labels.model_dump(exclude={"weight"}) | {
                    "blank": BLANK if head == "ctc" else None
                }
                found[f"pseudo_{head}"] = (
                    settings.pseudo_labels.weight * share,
                    losses.pseudo_label(logits, plain, weights, **known),
                )
        if self.hypotheses and (rows := self._with_target("ctc", batch)):
            found |= self._words(outputs, batch, rows)
        if settings.intermediate.weight:
            found |= self._within(outputs, batch, told)
        if settings.gamma and (rows := self._with_target("ctc", batch)):
            found["features"] = settings.gamma, self._features(outputs, batch, rows)
        return found or {"nothing": (0.0, outputs.ctc_logits.sum() * 0)}  # a batch that no teacher speaks of

    def distance(self, head: str, outputs: Outputs, batch: Batch, target: TeacherEnsemble) -> float:
        """KL by frame, or step, from a target to what the student says of a batch."""
        logits, lengths = _of(head, outputs, batch)
        wanted, frames = target.to(logits.device).logits(batch.utt_ids, batch.speakers, lengths.tolist())
        inside = length_mask(torch.minimum(lengths, frames.to(lengths)), logits.shape[1]).float()
        wanted = _fitted(wanted, logits.shape[1])
        return float(losses.soft_kl(logits, wanted, inside, 1.0, fixed_temperature=target.fixed_temperature))

    def answer(self, batch: Batch) -> Outputs:
        """What the student says of a batch."""
        inputs = teacher_forced(batch.ids)[0].to(batch.wavs.device) if "decoder" in self.heads else None
        student = self.learner.student
        if self.encoder_cache is not None and student.training:
            return student.apply_heads(*self.encoder_cache(batch.utt_ids, batch.wavs, batch.wav_lens), {}, inputs)
        return student(batch.wavs, batch.wav_lens, inputs)

    def _hard(self, head: str, outputs: Outputs, batch: Batch, told: Sequence[int]) -> torch.Tensor:
        """The loss of the references, of the rows that have one."""
        ids = [batch.ids[row] for row in told]
        whole = len(told) == len(batch.ids)
        if head == "decoder":
            logits = outputs.decoder_logits if whole else outputs.decoder_logits[told]
            return cross_entropy(logits[:, : max(map(len, ids)) + 1], ids, self.settings.label_smoothing)
        return self._smoothed(outputs.ctc_logits, outputs.lengths, ids, None if whole else told)

    def _smoothed(
        self, logits: torch.Tensor, lengths: torch.Tensor, ids: list[list[int]], rows: Sequence[int] | None
    ) -> torch.Tensor:
        """CTC of some rows, or all, with its smoothing."""
        if rows is not None:
            logits, lengths = logits[rows], lengths[rows]
        loss, share = ctc_loss(Outputs(logits, lengths, logits), ids), self.settings.ctc_smoothing
        if not share:
            return loss
        return (1 - share) * loss + share * losses.uniform_kl(logits, length_mask(lengths, logits.shape[1]).float())

    def _words(self, outputs: Outputs, batch: Batch, rows: Sequence[int]) -> dict[str, tuple[float, torch.Tensor]]:
        """What is taught by whole words and texts, of the rows that teachers speak of."""
        settings, found = self.settings, {}
        logits, lengths = outputs.ctc_logits[rows], outputs.lengths[rows]
        asked = [batch.utt_ids[row] for row in rows], [batch.speakers[row] for row in rows]
        share = self.shares["ctc"]
        if settings.words.weight and "ctc" in self.heads:
            lexicon, target = self._listed(self.hypotheses.posterior(*asked, settings.words.temperature))
            weights = target.sum(1).clamp(0, 1).round()  # 0 where no word fits into the frames
            loss = losses.word_kl(logits, lengths, lexicon, target, weights, settings.words.temperature)
            found["words_ctc"] = settings.words.weight * share, loss
        if settings.sequence.weight:
            found |= self._texts(outputs, rows, asked)
        if settings.occupancy.weight and "ctc" in self.heads:
            sure = settings.occupancy.confidence
            guessed = self.hypotheses.texts(*asked) if any(not batch.ids[row] for row in rows) else [[]] * len(rows)
            ids = [
                batch.ids[row] or (texts[0][0] if texts and texts[0][1] >= sure else [])
                for row, texts in zip(rows, guessed, strict=True)
            ]
            if some := [place for place, one in enumerate(ids) if one]:
                loss = self._occupied(logits[some], lengths[some], [ids[place] for place in some], _chosen(asked, some))
                found["occupancy_ctc"] = settings.occupancy.weight * share, loss
        return found

    def _listed(self, target: torch.Tensor) -> tuple[Lexicon, torch.Tensor]:
        """The lexicon and the target over it: whole, or the words that the teachers think of, and some at random."""
        settings, lexicon = self.settings.words, self.hypotheses.lexicon
        if not settings.shortlist or settings.shortlist >= len(lexicon.words):
            return lexicon, target
        places = target.topk(settings.shortlist, 1).indices.unique()
        if settings.random_words:
            places = torch.cat([places, torch.randperm(len(lexicon.words))[: settings.random_words]]).unique()
        part = target[:, places]
        return lexicon.among(places.tolist()), part / part.sum(1, keepdim=True).clamp_min(1e-9)

    def _texts(self, outputs: Outputs, rows: Sequence[int], asked: tuple) -> dict[str, tuple[float, torch.Tensor]]:
        """The teachers' texts as references, of those rows that they are sure enough of."""
        settings = self.settings.sequence
        which, ids, weights = [], [], []
        for row, texts in zip(
            rows, self.hypotheses.texts(*asked, settings.nbest, settings.hypotheses_from), strict=True
        ):
            if not texts or texts[0][1] < settings.confidence:
                continue
            total = 1.0 if settings.weight_by_confidence else sum(share for _, share in texts)
            which += [row] * len(texts)
            ids += [one for one, _ in texts]
            weights += [share / total for _, share in texts]
        if not which:
            return {}
        found, counts = {}, torch.tensor(weights)
        if "ctc" in self.heads:
            loss = losses.sequence_ctc(outputs.ctc_logits, outputs.lengths, which, ids, counts)
            found["sequence_ctc"] = settings.weight * self.shares["ctc"], loss
        if "decoder" in self.heads:
            inputs = teacher_forced(ids)[0].to(outputs.encoded.device)
            said = self.learner.student.forward_decoder(outputs.encoded[which], inputs, outputs.lengths[which])
            each = cross_entropies(said, ids, self.settings.label_smoothing)
            loss = (each * counts.to(each)).sum() / len(set(which))
            found["sequence_decoder"] = settings.weight * self.shares["decoder"], loss
        return found

    def _occupied(
        self, logits: torch.Tensor, lengths: torch.Tensor, ids: list[list[int]], asked: tuple
    ) -> torch.Tensor:
        """KL against the teachers' mean occupancy."""
        target = 0.0
        with torch.autocast(logits.device.type, enabled=False):
            for theirs, weights in self.targets["ctc"].to(logits.device).each(*asked, lengths.tolist()):
                target = target + weights[:, None, None] * losses.occupancy(theirs, lengths, ids)
        target = _fitted(target, logits.shape[1])
        counts = (target.sum(-1) > 0.5).float()
        sure = target / target.sum(-1, keepdim=True).clamp_min(1e-9)
        return losses.soft_kl(logits, sure.clamp_min(1e-12).log(), counts, fixed_temperature=True)

    def _within(self, outputs: Outputs, batch: Batch, told: Sequence[int]) -> dict[str, tuple[float, torch.Tensor]]:
        """The head on a layer within the encoder: references, and the student's own last head."""
        settings = self.settings.intermediate
        logits = self.learner.within(outputs.hidden[settings.layer])
        inside = length_mask(outputs.lengths, logits.shape[1]).float()
        found = {"intermediate_self": (settings.weight, losses.soft_kl(logits, outputs.ctc_logits.detach(), inside))}
        if told:
            ids = [batch.ids[row] for row in told]
            found["intermediate_ctc"] = settings.weight, self._smoothed(logits, outputs.lengths, ids, told)
        return found

    def _soft(
        self, head: str, outputs: Outputs, batch: Batch, rows: Sequence[int], temperature: float
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of the rows that have a target: the student's logits, the target, the same at T = 1, the rows' weights."""
        settings, ensemble = self.settings, self.targets[head]
        logits, lengths = _of(head, outputs, batch)
        whole = len(rows) == len(batch.ids)
        logits, lengths = (logits, lengths) if whole else (logits[rows], lengths[rows])
        asked = [batch.utt_ids[row] for row in rows], [batch.speakers[row] for row in rows], lengths.tolist()
        made_at = temperature if settings.temperature_on != "student" else 1.0
        target, frames = self._asked(head, asked, made_at, logits)
        lengths, plain = torch.minimum(lengths, frames.to(lengths)), target
        if ensemble.fixed_temperature and made_at != 1 and (settings.pseudo_labels.weight or self._chooses(head)):
            plain, _ = self._asked(head, asked, 1.0, logits)
        if head == "decoder":
            weights = length_mask(lengths, logits.shape[1]).float()
            if settings.first_token == "skip":
                weights[:, 0] = 0
            elif settings.first_token == "suppress_specials":
                target, plain = (losses.mask_specials(one, (BOS, EOS, BLANK)) for one in (target, plain))
            return logits, target, plain, weights
        if settings.max_shift:
            shifts, _ = losses.best_shift(logits, plain, lengths, settings.max_shift, BLANK)
            target, plain = (losses.shift_frames(one, shifts, lengths) for one in (target, plain))
        return (
            logits,
            target,
            plain,
            losses.frame_weights(plain, lengths, settings.blanks, BLANK, settings.context_frames),
        )

    def _chooses(self, head: str) -> bool:
        """Whether frames are chosen or moved by what the target says."""
        return head == "ctc" and (self.settings.max_shift > 0 or self.settings.blanks != "all")

    def _asked(
        self, head: str, asked: tuple, temperature: float, like: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The teachers' target in full precision, with as many rows as the student's logits, and how many count."""
        with torch.autocast(like.device.type, enabled=False):
            target, frames = self.targets[head].to(like.device).logits(*asked, temperature)
        return _fitted(target, like.shape[1]), frames

    def _features(self, outputs: Outputs, batch: Batch, rows: Sequence[int]) -> torch.Tensor:
        lengths = outputs.lengths[rows]
        asked = [batch.utt_ids[row] for row in rows], [batch.speakers[row] for row in rows]
        wanted = self.targets["ctc"].to(outputs.encoded.device).features(*asked, lengths.tolist())
        longest = outputs.encoded.shape[1]
        weights = length_mask(lengths, longest).float()
        return losses.feature_mse(outputs.encoded[rows], _fitted(wanted, longest), weights, self.learner.project)

    def _with_target(self, head: str, batch: Batch) -> list[int]:
        """Which rows of a batch have a target."""
        new = [utt_id for utt_id in batch.utt_ids if (head, utt_id) not in self._usable]
        if new:
            usable = set(self.targets[head].coverage(new).usable)
            self._usable |= {(head, utt_id): utt_id in usable for utt_id in new}
        return [row for row, utt_id in enumerate(batch.utt_ids) if self._usable[head, utt_id]]


def anneal(start: float, end: float | None, done: float) -> float:
    """A value that goes from start to end in a straight line while training goes from 0 to 1.

    >>> annealed(4.0, 2.0, 0.5), annealed(4.0, None, 0.5)
    (3.0, 4.0)
    """
    return start if end is None else start + (end - start) * min(1.0, max(0.0, done))


def _chosen(asked: tuple[Sequence[str], ...], places: Sequence[int]) -> tuple[list[str], ...]:
    return tuple([one[place] for place in places] for one in asked)


def _of(head: str, outputs: Outputs, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """A head's logits and how many rows of each utterance are no padding."""
    if head == "ctc":
        return outputs.ctc_logits, outputs.lengths
    return outputs.decoder_logits, torch.tensor([len(one) + 1 for one in batch.ids]).to(outputs.encoded.device)


def _fitted(target: torch.Tensor, longest: int) -> torch.Tensor:
    """A target with as many rows as the student's output: what is more is padding on one side or the other."""
    if target.shape[1] >= longest:
        return target[:, :longest]
    return nn.functional.pad(target, (0, 0, 0, longest - target.shape[1]))
