"""LangChain (pip install langchain-openai): a chain, a stream, a batch, structured output."""

import argparse
from typing import Literal

from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel, ConfigDict


class Answer(BaseModel):
    model_config = ConfigDict(extra="forbid")

    continent: Literal["Africa", "America", "Asia", "Australia", "Europe"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--model", default="smollm2-135m-nsa")
    args = parser.parse_args()
    server = {"base_url": args.base_url, "api_key": "none", "model": args.model}
    chat = ChatOpenAI(**server, temperature=0, max_tokens=24)

    prompt = ChatPromptTemplate.from_messages(
        [("system", "Answer in one sentence."), ("user", "What is the capital of {country}?")]
    )
    chain = prompt | chat | StrOutputParser()
    print("chain:", chain.invoke({"country": "France"}))
    print("stream:", "|".join(chain.stream({"country": "Italy"})))
    print("batch:", chain.batch([{"country": "Spain"}, {"country": "Egypt"}]))

    structured = chat.with_structured_output(Answer, method="json_schema")
    print("structured:", structured.invoke("On which continent is France? Answer as JSON."))

    # Parameters that LangChain does not know go into extra_body.
    choice = ChatOpenAI(**server, extra_body={"structured_outputs": {"choice": ["yes", "no"]}})
    print("choice:", choice.invoke("Is France in Europe?").content)

    completion = OpenAI(**server, temperature=0, max_tokens=8)
    print("completion:", completion.invoke("The capital of France is"))


if __name__ == "__main__":
    main()
