"""Two passes a step inside training frameworks: mixins, which import no framework. Nothing here is imported with the package."""
