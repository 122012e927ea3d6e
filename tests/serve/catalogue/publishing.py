from __future__ import annotations

from serve.catalogue.candidate import Candidate
from serve.catalogue.catalogue import Catalogue
from serve.catalogue.log import CatalogueLog
from tests.serve.conftest import candidate

OLD, NEW = candidate("pirate", "old"), candidate("pirate", "new")


def published(log: CatalogueLog, *candidates: Candidate) -> Catalogue:
    for each in candidates:
        log.stage(each)
        log.promote(each)
    return log.read()
