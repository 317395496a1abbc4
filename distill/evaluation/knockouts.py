"""Ablations (knock-outs): a student with one branch of its mixers set to zero.

Hybrids with attention and a state in one layer are known to bypass the state (arXiv 2510.05901): they score as well without
it. The window-only control (twin) shows what windows without states learn. An ablation shows what the finished student uses.
"""

import copy

from students.skeleton import Student

STATE = "ssm"  # the name of the state's branch in composed mixers; the other is attention, full or in a window


def has_branches(student: Student) -> bool:
    """Whether some mixer of a student has more than one branch."""
    return any(len(mixer.branch_terms()) > 1 for mixer in student.mixers.values())


def knocked_out(student: Student, state: bool) -> Student:
    """Return a copy of a student that shares its weights, with one branch of each composed mixer set to zero.

    Nothing else changes: the other branch is not scaled up, and mixers with one branch stay whole.

    Args:
        state: whether the states are set to zero; otherwise the attention branches are.
    """
    shared = {id(tensor): tensor for tensor in (*student.parameters(), *student.buffers())}
    model = copy.deepcopy(student, shared)
    for mixer in model.mixers.values():
        branches = mixer.branch_terms()
        if len(branches) > 1:
            mixer.silence(name for name in branches if (name == STATE) == state)
    return model
