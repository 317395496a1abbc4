"""A student without one of its mixers' branches: what each branch is worth to it as it stands.

Hybrids with attention beside a state are known to bypass the state (arXiv 2510.05901): they score as well without it. A twin
says what windows alone would have learnt; a knock-out, what the finished student uses.
"""

import copy

from students.skeleton import Student

STATE = "ssm"  # what composed mixers call the branch of their state; the other is attention, whole or in a window


def has_branches(student: Student) -> bool:
    """Whether some mixer of a student has more branches than one."""
    return any(len(mixer.branch_terms()) > 1 for mixer in student.mixers.values())


def knocked_out(student: Student, state: bool) -> Student:
    """A copy of a student that shares its weights, and in which one branch of each composed mixer adds nothing.

    Everything else stays as it is: nothing is scaled up for what is missing, and mixers of one branch are whole.

    Args:
        state: whether the states are silent; the attention beside them otherwise.
    """
    shared = {id(tensor): tensor for tensor in (*student.parameters(), *student.buffers())}
    model = copy.deepcopy(student, shared)
    for mixer in model.mixers.values():
        branches = mixer.branch_terms()
        if len(branches) > 1:
            mixer.silence(name for name in branches if (name == STATE) == state)
    return model
