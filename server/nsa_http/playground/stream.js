// The API as the page uses it: requests, errors that say what to do, and server-sent events.

// The page lies at the root of the server, or below a proxy's prefix.
const root = new URL(".", document.baseURI);

export class ApiError extends Error {
  constructor(message, status, param) {
    super(message);
    this.status = status;
    this.param = param ?? "";
  }
}

export async function request(path, { key, body, signal } = {}) {
  const headers = {};
  if (key) headers.Authorization = `Bearer ${key}`;
  if (body !== undefined) headers["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(new URL(path, root), {
      method: body === undefined ? "GET" : "POST",
      headers,
      body: body === undefined ? undefined : JSON.stringify(body),
      signal,
      credentials: "omit",
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server does not answer. Is it running?", 0);
  }
  if (!response.ok) throw await errorOf(response);
  return response;
}

async function errorOf(response) {
  const text = await response.text();
  try {
    const { message, param } = JSON.parse(text).error;
    return new ApiError(message, response.status, param);
  } catch {
    return new ApiError(`HTTP ${response.status}: ${text.slice(0, 300)}`, response.status);
  }
}

// Yields the parsed data of each event until [DONE]; an error event is thrown.
export async function* events(response) {
  const reader = response.body.getReader();
  const decoder = new TextDecoder();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) throw new ApiError("The connection ended before the answer did.", 0);
      rest += decoder.decode(value, { stream: true });
      const lines = rest.split(/\r\n|\n/);
      rest = lines.pop();
      for (const line of lines) {
        // Comments keep the connection alive; the server writes each event's data in one line.
        if (!line.startsWith("data:")) continue;
        const data = line.slice(5).trim();
        if (data === "[DONE]") return;
        const chunk = JSON.parse(data);
        if (chunk.error) throw new ApiError(chunk.error.message, chunk.error.code, chunk.error.param);
        yield chunk;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
