"""Jobs of a module that imports nothing, so that a script that runs only these starts fast."""


def double(number, report):
    return 2 * number


def say(report):
    print("said by a worker")
