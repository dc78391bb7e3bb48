// OpenAI's JavaScript client against a running server: node with_openai.mjs URL
import assert from "node:assert/strict";
import OpenAI from "openai";

const client = new OpenAI({ baseURL: `${process.argv[2]}/v1`, apiKey: "none", maxRetries: 0 });
const model = "diptych-demo";
const messages = [{ role: "user", content: "What is prefill?" }];
const parameters = {
  type: "object",
  properties: { city: { enum: ["Berlin", "Paris"] }, days: { type: "integer", minimum: 1, maximum: 9 } },
  required: ["city", "days"],
  additionalProperties: false,
};
const tools = [{ type: "function", function: { name: "weather", parameters } }];

const scenarios = {
  async models() {
    const found = [];
    for await (const each of client.models.list()) found.push(each.id);
    assert(found.includes(model));
  },
  async "chat, whole and streamed, agree"() {
    const whole = await client.chat.completions.create({ model, messages, temperature: 0 });
    let text = "";
    let usage;
    const options = { stream: true, stream_options: { include_usage: true } };
    for await (const chunk of await client.chat.completions.create({ model, messages, temperature: 0, ...options })) {
      text += chunk.choices[0]?.delta?.content ?? "";
      usage = chunk.usage ?? usage;
    }
    assert.equal(text, whole.choices[0].message.content);
    assert.deepEqual(usage, whole.usage);
  },
  async completions() {
    const got = await client.completions.create({ model, prompt: "The fox", max_tokens: 8, n: 2, logprobs: 1 });
    assert.equal(got.choices.length, 2);
    assert.equal(got.choices[0].logprobs.tokens.length, 8);
  },
  async "the stream helper"() {
    const runner = client.chat.completions.stream({ model, messages, temperature: 0 });
    const final = await runner.finalChatCompletion();
    assert.equal(final.choices[0].finish_reason, "stop");
  },
  async "leaving in the middle of a stream"() {
    const stop = new AbortController();
    const stream = await client.chat.completions.create(
      { model, messages, stream: true, ignore_eos: true },
      { signal: stop.signal },
    );
    let seen = 0;
    for await (const chunk of stream) if (++seen === 3) stop.abort();
    assert(seen < 100, `${seen} chunks after leaving`);
    assert((await client.chat.completions.create({ model, messages, max_tokens: 2 })).choices.length);
  },
  async "errors have their types"() {
    const call = (how) => client.chat.completions.create({ model, messages, ...how });
    await assert.rejects(call({ model: "nobody" }), OpenAI.NotFoundError);
    await assert.rejects(call({ temperature: 9 }), OpenAI.BadRequestError);
    await assert.rejects(call({ messages: [] }), (error) => error.param === "messages" && error.requestID.length > 0);
  },
  async "structured output"() {
    const json_schema = { name: "call", strict: true, schema: parameters };
    const response_format = { type: "json_schema", json_schema };
    const got = await client.chat.completions.create({ model, messages, response_format, max_tokens: 300 });
    assert.deepEqual(Object.keys(JSON.parse(got.choices[0].message.content)).sort(), ["city", "days"]);
  },
  async "tool calls, whole and streamed"() {
    const how = { model, messages, tools, tool_choice: "required", parallel_tool_calls: false, temperature: 0 };
    const whole = await client.chat.completions.create({ ...how, max_tokens: 400 });
    const [call] = whole.choices[0].message.tool_calls;
    assert.equal(whole.choices[0].finish_reason, "tool_calls");
    assert.equal(call.function.name, "weather");
    JSON.parse(call.function.arguments);
    const final = await client.chat.completions.stream({ ...how, max_tokens: 400 }).finalChatCompletion();
    assert.equal(final.choices[0].message.tool_calls[0].function.arguments, call.function.arguments);
  },
  async "a tool's result goes back"() {
    const tool_choice = { type: "function", function: { name: "weather" } };
    const got = await client.chat.completions.create({ model, messages, tools, tool_choice, max_tokens: 400 });
    const { message } = got.choices[0];
    const result = { role: "tool", tool_call_id: message.tool_calls[0].id, content: "rain" };
    const more = [...messages, message, result];
    assert((await client.chat.completions.create({ model, messages: more, tools, max_tokens: 9 })).choices.length);
  },
};

let failed = 0;
for (const [name, scenario] of Object.entries(scenarios)) {
  try {
    await scenario();
    console.log(`PASS  openai (npm): ${name}`);
  } catch (error) {
    failed += 1;
    console.log(`FAIL  openai (npm): ${name}: ${String(error).slice(0, 300)}`);
    console.error(error);
  }
}
process.exit(failed ? 1 : 0);
