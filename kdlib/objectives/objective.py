"""The training objective of a student: alpha x KD + beta x references + gamma x encodings of the teachers.

Each term is computed for the heads that are trained; with both, the CTC head's share is `ctc_weight`. Weights and the
temperature can be annealed linearly over training. Utterances without a target (their teachers are missing) are trained
on the reference alone, those without a transcript on the teachers alone; every term is a mean over the utterances that
have it. Besides frame-wise KL there are posteriors over words, pseudo-labels and occupancies, each with its own weight.
With all teacher weights 0 no target is computed: the hard-label run of the same steps and seed is this same code.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import nn

from kdlib.decode.lexicon import Lexicon
from kdlib.models import Emissions, Outputs
from kdlib.models.decoder import teacher_forced
from kdlib.models.encoder_cache import EncoderCache
from kdlib.models.encoder_conformer import length_mask
from kdlib.models.hybrid import Hybrid
from kdlib.objectives import losses
from kdlib.objectives.reference_losses import cross_entropies, cross_entropy, ctc_loss
from kdlib.settings.distill import Distill
from kdlib.targets.aggregation import TeacherEnsemble
from kdlib.targets.pseudo_labels import TeacherHypotheses
from kdlib.tokens import BLANK, BOS, EOS

Terms = dict[str, tuple[float, torch.Tensor]]  # name -> weight and loss


class Batch(NamedTuple):
    """The input of one training step."""

    wavs: torch.Tensor  # [B, N]
    wav_lens: torch.Tensor  # [B], samples
    ids: list[list[int]]  # of the references; empty without a transcript
    utt_ids: list[str]
    speakers: list[str]


class TrainableStudent(nn.Module):
    """A student with the layers that only training needs: a projection of its encodings, an intermediate CTC head."""

    def __init__(self, student: Hybrid, features: int = 0, tap: int = 0) -> None:
        super().__init__()
        self.student = student
        self.project = nn.Linear(student.encoder.width, features) if features else None
        self.intermediate_head = None
        if tap:
            student.encoder.return_layer(tap)
            self.intermediate_head = nn.Linear(student.encoder.width, student.heads.size)


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
        self.encoder_cache: EncoderCache | None = None  # of a frozen encoder, if recordings are not augmented

    def __call__(self, batch: Batch, done: float = 0.0) -> dict[str, torch.Tensor]:
        """Named losses; "loss" is their weighted sum."""
        parts = self.parts(batch, done)
        total = sum(weight * value for weight, value in parts.values())
        return {"loss": total} | {name: value for name, (_, value) in parts.items()}

    def parts(self, batch: Batch, done: float = 0.0) -> Terms:
        """Every loss with its weight."""
        settings, pseudo = self.settings, self.settings.pseudo_labels
        alpha = anneal(settings.alpha, settings.alpha_end, done)
        temperature = anneal(settings.temperature, settings.temperature_end, done)
        outputs = self.student_outputs(batch)
        terms: Terms = {}
        labelled = [row for row, ids in enumerate(batch.ids) if ids]
        for head in self.heads:
            share = self.shares[head]
            if settings.beta and labelled:
                terms[head] = settings.beta * share, self._reference_loss(head, outputs, batch, labelled)
            rows = self._rows_with_target(head, batch) if alpha or pseudo.weight else []
            if not rows:
                continue
            logits, target, plain, weights = self._teacher_target(head, outputs, batch, rows, temperature)
            if alpha:
                sides = {
                    "temperature_on": settings.temperature_on,
                    "fixed_temperature": self.targets[head].fixed_temperature,
                }
                terms[f"kd_{head}"] = alpha * share, losses.soft_kl(logits, target, weights, temperature, **sides)
            if pseudo.weight:
                options = pseudo.model_dump(exclude={"weight"}) | {"blank": BLANK if head == "ctc" else None}
                terms[f"pseudo_{head}"] = pseudo.weight * share, losses.pseudo_label(logits, plain, weights, **options)
        if self.hypotheses and (rows := self._rows_with_target("ctc", batch)):
            terms |= self._hypothesis_terms(outputs, batch, rows)
        if settings.intermediate.weight:
            terms |= self._intermediate_terms(outputs, batch, labelled)
        if settings.gamma and (rows := self._rows_with_target("ctc", batch)):
            terms["features"] = settings.gamma, self._feature_loss(outputs, batch, rows)
        return terms or {"nothing": (0.0, outputs.ctc.logits.sum() * 0)}  # a batch without targets or references

    def distance(self, head: str, outputs: Outputs, batch: Batch, target: TeacherEnsemble) -> float:
        """Mean KL per frame, or decoder step, from a target to the student's outputs on a batch."""
        logits, lengths = _head_logits(head, outputs, batch)
        teacher, frames = target.to(logits.device).logits(batch.utt_ids, batch.speakers, lengths.tolist())
        inside = length_mask(torch.minimum(lengths, frames.to(lengths)), logits.shape[1]).float()
        teacher = _fit_length(teacher, logits.shape[1])
        return float(losses.soft_kl(logits, teacher, inside, 1.0, fixed_temperature=target.fixed_temperature))

    def student_outputs(self, batch: Batch) -> Outputs:
        """The student's outputs on a batch."""
        inputs = teacher_forced(batch.ids)[0].to(batch.wavs.device) if "decoder" in self.heads else None
        student = self.learner.student
        if self.encoder_cache is not None and student.training:
            return student.apply_heads(*self.encoder_cache(batch.utt_ids, batch.wavs, batch.wav_lens), {}, inputs)
        return student(batch.wavs, batch.wav_lens, inputs)

    def _reference_loss(self, head: str, outputs: Outputs, batch: Batch, labelled: Sequence[int]) -> torch.Tensor:
        """The loss against the references, over the rows that have one."""
        ids = [batch.ids[row] for row in labelled]
        whole = len(labelled) == len(batch.ids)
        if head == "decoder":
            logits = outputs.decoder_logits if whole else outputs.decoder_logits[labelled]
            return cross_entropy(logits[:, : max(map(len, ids)) + 1], ids, self.settings.label_smoothing)
        return self._smoothed_ctc(outputs.ctc.logits, outputs.lengths, ids, None if whole else labelled)

    def _smoothed_ctc(
        self, logits: torch.Tensor, lengths: torch.Tensor, ids: list[list[int]], rows: Sequence[int] | None
    ) -> torch.Tensor:
        """CTC loss with label smoothing, over `rows` or all of the batch."""
        if rows is not None:
            logits, lengths = logits[rows], lengths[rows]
        loss, share = ctc_loss(Emissions(logits, lengths), ids), self.settings.ctc_smoothing
        if not share:
            return loss
        return (1 - share) * loss + share * losses.uniform_kl(logits, length_mask(lengths, logits.shape[1]).float())

    def _hypothesis_terms(self, outputs: Outputs, batch: Batch, rows: Sequence[int]) -> Terms:
        """The terms of the teachers' hypotheses: words, sequences and occupancies, over the rows with a target."""
        settings, terms = self.settings, {}
        logits, lengths = outputs.ctc.logits[rows], outputs.lengths[rows]
        utts = _utterances(batch, rows)
        share = self.shares["ctc"]
        if settings.words.weight and "ctc" in self.heads:
            lexicon, target = self._shortlist(self.hypotheses.posterior(*utts, settings.words.temperature))
            weights = target.sum(1).clamp(0, 1).round()  # 0 if no word fits into the frames
            loss = losses.word_kl(logits, lengths, lexicon, target, weights, settings.words.temperature)
            terms["words_ctc"] = settings.words.weight * share, loss
        if settings.sequence.weight:
            terms |= self._sequence_terms(outputs, rows, utts)
        if settings.occupancy.weight and "ctc" in self.heads:
            unlabelled = any(not batch.ids[row] for row in rows)
            best = self.hypotheses.texts(*utts) if unlabelled else [[]] * len(rows)
            ids = [
                batch.ids[row] or (texts[0][0] if texts and texts[0][1] >= settings.occupancy.confidence else [])
                for row, texts in zip(rows, best, strict=True)
            ]
            if places := [place for place, text in enumerate(ids) if text]:
                texts, utts = [ids[place] for place in places], _utterances(batch, [rows[place] for place in places])
                loss = self._occupancy_kl(logits[places], lengths[places], texts, utts)
                terms["occupancy_ctc"] = settings.occupancy.weight * share, loss
        return terms

    def _shortlist(self, target: torch.Tensor) -> tuple[Lexicon, torch.Tensor]:
        """The lexicon and the target over it: all words, or the teachers' most probable ones and some at random."""
        settings, lexicon = self.settings.words, self.hypotheses.lexicon
        if not settings.shortlist or settings.shortlist >= len(lexicon.words):
            return lexicon, target
        places = target.topk(settings.shortlist, 1).indices.unique()
        if settings.random_words:
            places = torch.cat([places, torch.randperm(len(lexicon.words))[: settings.random_words]]).unique()
        part = target[:, places]
        return lexicon.among(places.tolist()), part / part.sum(1, keepdim=True).clamp_min(1e-9)

    def _sequence_terms(self, outputs: Outputs, rows: Sequence[int], utts: tuple[list[str], list[str]]) -> Terms:
        """The teachers' hypotheses as pseudo-labels, over the rows whose best one has enough confidence."""
        settings = self.settings.sequence
        which, ids, weights = [], [], []
        nbest = self.hypotheses.texts(*utts, settings.nbest, settings.hypotheses_from)
        for row, texts in zip(rows, nbest, strict=True):
            if not texts or texts[0][1] < settings.confidence:
                continue
            total = 1.0 if settings.weight_by_confidence else sum(share for _, share in texts)
            which += [row] * len(texts)
            ids += [text for text, _ in texts]
            weights += [share / total for _, share in texts]
        if not which:
            return {}
        terms, counts = {}, torch.tensor(weights)
        if "ctc" in self.heads:
            loss = losses.sequence_ctc(outputs.ctc.logits, outputs.lengths, which, ids, counts)
            terms["sequence_ctc"] = settings.weight * self.shares["ctc"], loss
        if "decoder" in self.heads:
            inputs = teacher_forced(ids)[0].to(outputs.encoded.device)
            logits = self.learner.student.forward_decoder(outputs.encoded[which], inputs, outputs.lengths[which])
            each = cross_entropies(logits, ids, self.settings.label_smoothing)
            loss = (each * counts.to(each)).sum() / len(set(which))
            terms["sequence_decoder"] = settings.weight * self.shares["decoder"], loss
        return terms

    def _occupancy_kl(
        self, logits: torch.Tensor, lengths: torch.Tensor, ids: list[list[int]], utts: tuple[list[str], list[str]]
    ) -> torch.Tensor:
        """KL from the teachers' mean occupancy."""
        target = 0.0
        with torch.autocast(logits.device.type, enabled=False):
            for teacher, weights in self.targets["ctc"].to(logits.device).each(*utts, lengths.tolist()):
                target = target + weights[:, None, None] * losses.occupancy(teacher, lengths, ids)
        target = _fit_length(target, logits.shape[1])
        counts = (target.sum(-1) > 0.5).float()
        normalised = target / target.sum(-1, keepdim=True).clamp_min(1e-9)
        return losses.soft_kl(logits, normalised.clamp_min(1e-12).log(), counts, fixed_temperature=True)

    def _intermediate_terms(self, outputs: Outputs, batch: Batch, labelled: Sequence[int]) -> Terms:
        """The intermediate head against the references and against the student's own last head."""
        settings = self.settings.intermediate
        logits = self.learner.intermediate_head(outputs.hidden[settings.layer])
        inside = length_mask(outputs.lengths, logits.shape[1]).float()
        terms = {"intermediate_self": (settings.weight, losses.soft_kl(logits, outputs.ctc.logits.detach(), inside))}
        if labelled:
            ids = [batch.ids[row] for row in labelled]
            terms["intermediate_ctc"] = settings.weight, self._smoothed_ctc(logits, outputs.lengths, ids, labelled)
        return terms

    def _teacher_target(
        self, head: str, outputs: Outputs, batch: Batch, rows: Sequence[int], temperature: float
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of the rows with a target: the student's logits, the target, the target at T = 1, the weights of frames."""
        settings, ensemble = self.settings, self.targets[head]
        logits, lengths = _head_logits(head, outputs, batch)
        whole = len(rows) == len(batch.ids)
        logits, lengths = (logits, lengths) if whole else (logits[rows], lengths[rows])
        query = *_utterances(batch, rows), lengths.tolist()
        made_at = temperature if settings.temperature_on != "student" else 1.0
        target, frames = self._target_logits(head, query, made_at, logits)
        lengths, plain = torch.minimum(lengths, frames.to(lengths)), target
        if ensemble.fixed_temperature and made_at != 1 and (settings.pseudo_labels.weight or self._selects(head)):
            plain, _ = self._target_logits(head, query, 1.0, logits)
        if head == "decoder":
            weights = length_mask(lengths, logits.shape[1]).float()
            if settings.first_token == "skip":
                weights[:, 0] = 0
            elif settings.first_token == "suppress_specials":
                target, plain = (losses.mask_specials(side, (BOS, EOS, BLANK)) for side in (target, plain))
            return logits, target, plain, weights
        if settings.max_shift:
            shifts, _ = losses.best_shift(logits, plain, lengths, settings.max_shift, BLANK)
            target, plain = (losses.shift_frames(side, shifts, lengths) for side in (target, plain))
        weights = losses.frame_weights(plain, lengths, settings.blanks, BLANK, settings.context_frames)
        return logits, target, plain, weights

    def _selects(self, head: str) -> bool:
        """Return whether the target decides which frames count, or how far they are shifted."""
        return head == "ctc" and (self.settings.max_shift > 0 or self.settings.blanks != "all")

    def _target_logits(
        self, head: str, query: tuple, temperature: float, like: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The teachers' target in full precision, as long as the student's logits, and its frames per utterance."""
        with torch.autocast(like.device.type, enabled=False):
            target, frames = self.targets[head].to(like.device).logits(*query, temperature)
        return _fit_length(target, like.shape[1]), frames

    def _feature_loss(self, outputs: Outputs, batch: Batch, rows: Sequence[int]) -> torch.Tensor:
        lengths, longest = outputs.lengths[rows], outputs.encoded.shape[1]
        ensemble = self.targets["ctc"].to(outputs.encoded.device)
        target = _fit_length(ensemble.features(*_utterances(batch, rows), lengths.tolist()), longest)
        weights = length_mask(lengths, longest).float()
        return losses.feature_mse(outputs.encoded[rows], target, weights, self.learner.project)

    def _rows_with_target(self, head: str, batch: Batch) -> list[int]:
        """The rows of a batch that have a target."""
        new = [utt_id for utt_id in batch.utt_ids if (head, utt_id) not in self._usable]
        if new:
            usable = set(self.targets[head].coverage(new).usable)
            self._usable |= {(head, utt_id): utt_id in usable for utt_id in new}
        return [row for row, utt_id in enumerate(batch.utt_ids) if self._usable[head, utt_id]]


def anneal(start: float, end: float | None, done: float) -> float:
    """A value that goes linearly from start to end while training goes from 0 to 1.

    >>> anneal(4.0, 2.0, 0.5), anneal(4.0, None, 0.5)
    (3.0, 4.0)
    """
    return start if end is None else start + (end - start) * min(1.0, max(0.0, done))


def _utterances(batch: Batch, rows: Sequence[int]) -> tuple[list[str], list[str]]:
    """The ids and the speakers of rows of a batch."""
    return [batch.utt_ids[row] for row in rows], [batch.speakers[row] for row in rows]


def _head_logits(head: str, outputs: Outputs, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """A head's logits, and the number of frames or steps of each utterance that are not padding."""
    if head == "ctc":
        return outputs.ctc.logits, outputs.lengths
    return outputs.decoder_logits, torch.tensor([len(ids) + 1 for ids in batch.ids]).to(outputs.encoded.device)


def _fit_length(target: torch.Tensor, longest: int) -> torch.Tensor:
    """Cut or pad a target to the length of the student's output; the difference is padding on either side."""
    if target.shape[1] >= longest:
        return target[:, :longest]
    return nn.functional.pad(target, (0, 0, 0, longest - target.shape[1]))
