"""The exception that the client raises."""


class ApiException(Exception):
    pass
