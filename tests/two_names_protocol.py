"""A protocol that the package does not know: the concept beside one other name. This one file adds it."""

from sa_diffusers.evaluation import Protocol, compare, prompt_groups, register_protocol
from sa_diffusers.evaluation.subject import draw_both


@register_protocol("two-names", images=2)
class TwoNames(Protocol):
    takes = "prompts"

    def __init__(self, request):
        super().__init__(request)
        if not request.args.unrelated or len(request.args.unrelated) != 1:
            raise ValueError("the two-names protocol needs --unrelated with one name")

    def run(self, evaluation):
        subject, measures = evaluation.subject, evaluation.measures
        groups = prompt_groups(subject.pairs, self.request.args.unrelated, ["{}"], subject.count, subject.first_seed)
        drawn = draw_both(subject, groups, measures=(measures, measures))
        if drawn is None:
            return None
        facts = {**evaluation.provenance, "evaluators": [measure.provenance() for measure in measures]}
        return compare(groups, *drawn, subject.sampling, None, facts)
