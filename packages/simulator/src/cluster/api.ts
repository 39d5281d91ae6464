/** A small REST client for the demo, the benchmarks and the tests. */
interface ApiResponse<T> {
  readonly status: number;
  readonly headers: Headers;
  readonly body: T;
}

// The shape of an answer is what the caller expects of it; a test asserts it.
// oxlint-disable-next-line typescript/no-explicit-any
export type Json = any;

export interface Api {
  readonly baseUrl: string;
  readonly token: string;
  request(
    method: string,
    path: string,
    body?: unknown,
    headers?: Record<string, string>,
  ): Promise<ApiResponse<Json>>;
  /** The body of a 2xx answer; throws with the problem document otherwise. */
  get(path: string): Promise<Json>;
  post(path: string, body?: unknown, headers?: Record<string, string>): Promise<Json>;
  patch(path: string, body: unknown): Promise<Json>;
  delete(path: string): Promise<Json>;
  withToken(token: string): Api;
}

export function createApi(baseUrl: string, token: string): Api {
  const request: Api["request"] = async (method, path, body, headers = {}) => {
    const response = await fetch(`${baseUrl}${path}`, {
      method,
      headers: {
        authorization: `Bearer ${token}`,
        ...(body === undefined ? {} : { "content-type": "application/json" }),
        ...headers,
      },
      ...(body === undefined ? {} : { body: JSON.stringify(body) }),
      signal: AbortSignal.timeout(30_000),
    });
    const text = await response.text();
    const isJson = response.headers.get("content-type")?.includes("json") === true;
    return {
      status: response.status,
      headers: response.headers,
      body: isJson && text !== "" ? JSON.parse(text) : text,
    };
  };
  const checked = async (
    method: string,
    path: string,
    body?: unknown,
    headers?: Record<string, string>,
  ): Promise<Json> => {
    const response = await request(method, path, body, headers);
    if (response.status >= 300) {
      throw new Error(`${method} ${path}: ${response.status} ${JSON.stringify(response.body)}`);
    }
    return response.body;
  };
  return {
    baseUrl,
    token,
    request,
    get: (path) => checked("GET", path),
    post: (path, body, headers) => checked("POST", path, body, headers),
    patch: (path, body) => checked("PATCH", path, body),
    delete: (path) => checked("DELETE", path),
    withToken: (other) => createApi(baseUrl, other),
  };
}
