//! Values of labels, as closed lists.

use crate::disposition::names;

names! {
    /// What a device is doing.
    Phase {
        /// The vision encoder.
        Encode = "encode",
        /// Cross-attention keys and values.
        CrossKv = "cross_kv",
        /// The text decoder.
        Decode = "decode",
    }
}

names! {
    /// Why a batch was started at the size it had.
    Flush {
        /// It was full.
        Full = "full",
        /// The device was free and this is what there was.
        Idle = "idle",
        /// The device had waited for more as long as it may.
        Linger = "linger",
        /// The flow is draining.
        Drain = "drain",
    }
}

names! {
    /// A budget of items and bytes.
    PoolName {
        /// Payloads of consumed messages.
        Messages = "messages",
        /// Bodies and pixels.
        Images = "images",
        /// Bodies of requests to the endpoint.
        EndpointMessages = "endpoint_messages",
        /// Bodies and pixels of its images.
        EndpointImages = "endpoint_images",
    }
}

names! {
    /// How a host answered one request.
    ResponseClass {
        /// 2xx.
        Success = "2xx",
        /// 3xx.
        Redirect = "3xx",
        /// 4xx.
        ClientError = "4xx",
        /// 5xx.
        ServerError = "5xx",
        /// Any other number.
        Other = "other",
        /// Not at all: resolution, connection, TLS or time-out.
        None = "none",
    }
}

names! {
    /// What was known of an image before it was fetched.
    FetchCache {
        /// It was kept, and is as good as new.
        Fresh = "fresh",
        /// It was kept, and its host says that it is still right.
        Confirmed = "confirmed",
        /// It was fetched.
        Missed = "missed",
    }
}

names! {
    /// State of the worker.
    State {
        /// Loading the model, joining the group.
        Starting = "starting",
        /// At work.
        Running = "running",
        /// Told to pause.
        Paused = "paused",
        /// Finishing what is in flight.
        Draining = "draining",
    }
}
